"""The wheel that is built here, in a fresh environment with another torch: the op's tests pass, and it serves."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The oldest that the kernels are for, and the one after it, each with its torchvision.
OTHERS = {"2.11": ("torch==2.11.0", "torchvision==0.26.0"), "2.12": ("torch==2.12.1", "torchvision==0.27.1")}
HERE = ".".join(torch.__version__.split(".")[:2])
OP_TESTS = (
    "test_sg_roi_align.py",
    "test_sg_roi_align_inputs.py",
    "test_op_registration.py",
    "test_nms.py",
    "test_masks.py",
    "test_rle.py",
)
NEEDS = ("pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.100", "pycocotools>=2.0.8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("c++")), reason="no compiler here"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # Nothing of this environment may be found from there.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DSG_", "VIRTUAL_"))}
    ran = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=outside | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the sdist, as a package index would have it; built with the torch of these tests."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for room in ("ops", "model", "export", "service", "cli", "bench"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder)]
    environment = {**os.environ, "DSG_BUILD_OPS": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (found,) = (folder / "dist").glob("*.whl")
    assert "-py3-none-" in found.name
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, another torch and what serves."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    fresh = folder / "venv/bin/python"
    other = next(needs for version, needs in OTHERS.items() if version != HERE)
    (folder / "torch.txt").write_text("\n".join(other))
    pip = [fresh, "-m", "pip", "--disable-pip-version-check"]
    # Without the libraries of CUDA, as the cpu image has it: gigabytes that no test here would use.
    run(fresh, ROOT / "docker/torch_without_cuda.py", folder / "torch.txt", cwd=folder)
    run(*pip, "install", "--quiet", f"dsg[serve] @ {wheel.as_uri()}", *NEEDS, cwd=folder)
    return fresh


def test_another_torch_runs_the_kernels(python: Path, tmp_path: Path) -> None:
    told = "[torch.__version__, dsg.ops.kernel_name(), dsg.ops.__file__]"
    program = f"import json, torch, dsg.ops; print(json.dumps({told}))"
    version, kernel, where = json.loads(run(python, "-c", program, cwd=tmp_path))
    assert not version.startswith(HERE) and kernel == "cpu kernel"
    assert Path(where).is_relative_to(python.parents[1])


def test_the_ops_tests_pass_there(python: Path, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    shutil.copytree(ROOT / "tests/ops", tmp_path / "tests/ops", ignore=shutil.ignore_patterns("__pycache__"))
    files = [f"tests/ops/{name}" for name in OP_TESTS]
    said = run(python, "-m", "pytest", "-q", "-x", *files, cwd=tmp_path, OMP_NUM_THREADS="2")
    assert " passed" in said.splitlines()[-1] and "failed" not in said.splitlines()[-1]


@contextmanager
def serving(python: Path, folder: Path) -> Iterator[str]:
    """`dsg serve` of the fresh environment; its address."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DSG_"))}
    command = [str(python.parent / "dsg"), "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=outside, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            events = (json.loads(line) for line in process.stderr if line.startswith("{"))
            started = next(event for event in events if event["event"] == "serving")
            assert started["kernel"] == "cpu kernel"
            yield started["url"]
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


def test_it_serves_with_the_weights_inside(python: Path, tmp_path: Path) -> None:
    photo = (ROOT / "docs/pictures/coco_sheet.jpg").read_bytes()
    with serving(python, tmp_path) as url:
        request = urllib.request.Request(f"{url}/segment", photo, {"Content-Type": "image/jpeg"})
        with urllib.request.urlopen(request, timeout=120) as response:
            document = json.load(response)
    assert document["info"]["model"] == "dsg_lite0_coco" and document["annotations"]
