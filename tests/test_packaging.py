"""What users install: metadata, typing markers, and a wheel with everything that is no module inside."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("ops", "model", "export", "service", "cli", "bench")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
# For programs and people that read a checkout: figures, and notes that go with them.
NOT_SHIPPED = ("bench/results/", "bench/NOTES.md")


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files_of_rooms() -> set[str]:
    """Every file of the rooms that an installed package needs, as `room/...`."""
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in name and path.suffix != ".so":
                found.add(name)
    return {name for name in found if not name.startswith(NOT_SHIPPED)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that a build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=LEFT_OUT)
    return folder


def build(tree: Path, kind: str, kernels: str) -> Path:
    """The archive that `python -m build` makes of the copy."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{kind}",
        "--outdir",
        str(tree / "dist"),
        str(tree),
    ]
    environment = {**os.environ, "DSG_BUILD_OPS": kernels}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (archive,) = (tree / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


def test_installed_metadata_is_pyprojects() -> None:
    project = pyproject()["project"]
    installed = distribution("dsg")
    assert installed.version == project["version"]
    extras = set(project["optional-dependencies"])
    assert {"torch", "serve", "train", "test"} <= extras
    assert extras == set(installed.metadata.get_all("Provides-Extra"))
    (script,) = installed.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("dsg", "dsg.cli.main:main")


def test_typing_markers() -> None:
    assert all((ROOT / room / "py.typed").is_file() for room in ROOMS)


def test_torch_is_no_hard_requirement() -> None:
    assert not [need for need in pyproject()["project"]["dependencies"] if need.startswith("torch")]


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_rooms(tree: Path) -> None:
    has_compiler = shutil.which("c++") or shutil.which("g++")
    wheel = build(tree, "wheel", "cpu" if has_compiler else "off")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"dsg/{name}" for name in files_of_rooms()} <= inside
    kernels = [name for name in inside if name.startswith("dsg/ops/") and name.endswith(".so")]
    assert bool(kernels) == bool(has_compiler)
    assert not [name for name in inside if not name.startswith(("dsg/", "dsg-"))]


@pytest.mark.slow
def test_sdist_holds_the_sources_of_the_kernels(tree: Path) -> None:
    with tarfile.open(build(tree, "sdist", "off")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_rooms() <= inside
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= inside
