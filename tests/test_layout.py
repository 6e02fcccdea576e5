"""The shape of the tree: rooms, packages, direction of imports, length and names of files."""

import ast
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = {"ops", "model", "export", "service", "cli", "bench"}
FOLDERS = ROOMS | {"docker", "tests", "docs", ".ci"}
FILES = {
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "MANIFEST.in",
    "pyproject.toml",
    "setup.py",
    "docker-compose.yml",
    ".dockerignore",
    ".env",
    ".hadolint.yaml",
    ".gitattributes",
    ".gitignore",
}

# Package -> packages it may import, itself apart. `dsg.model` is the door of its room: presets, build, load.
MAY_IMPORT = {
    "dsg.ops": set(),
    "dsg.model.weights": set(),
    "dsg.model.network": {"dsg.ops", "dsg.model.weights"},
    "dsg.model": {"dsg.ops", "dsg.model.network", "dsg.model.weights"},
    "dsg.model.data": {"dsg.ops", "dsg.model.network"},
    "dsg.model.training": {
        "dsg.ops",
        "dsg.model",
        "dsg.model.network",
        "dsg.model.data",
        "dsg.model.weights",
    },
    "dsg.export": {"dsg.ops", "dsg.model", "dsg.model.network", "dsg.model.weights"},
    "dsg.service": {"dsg.ops", "dsg.model", "dsg.model.network", "dsg.model.weights", "dsg.export"},
}
MAY_IMPORT_ALL = {"dsg.cli", "dsg.bench"}

HARD_STOP = 400
SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}


def sources(*folders: str) -> list[Path]:
    """Source files below the folders, what a build left there apart."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def packages_on_disk() -> set[str]:
    """`dsg.*` name of every folder of the rooms that has an `__init__.py`."""
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    return {".".join(("dsg", *folder.parts)) for folder in folders}


def package_of(name: str) -> str | None:
    """The package that a dotted name lies in: the longest known one that it starts with."""
    known = [*MAY_IMPORT, *MAY_IMPORT_ALL]
    holders = [package for package in known if name == package or name.startswith(package + ".")]
    return max(holders, key=len) if holders else None


def imported_names(source: str) -> Iterator[str]:
    """Dotted names that a module imports from `dsg`, `from package import name` spelled out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dsg")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"relative import, line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dsg":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(package: str, source: str) -> list[str]:
    """Imports of a module of `package` that go the wrong way."""
    if package in MAY_IMPORT_ALL:
        return [name for name in imported_names(source) if package_of(name) is None]
    allowed = MAY_IMPORT[package] | {package}
    return [name for name in imported_names(source) if package_of(name) not in allowed]


def test_tree_holds_the_rooms_and_nothing_else() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git here to ask which files are tracked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [Path(name) for name in listed.stdout.split("\0") if name]
    assert {path.parts[0] for path in tracked if len(path.parts) > 1} <= FOLDERS
    assert {path.name for path in tracked if len(path.parts) == 1} <= FILES
    assert all((ROOT / room / "__init__.py").is_file() for room in ROOMS)


def test_pyproject_lists_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["packages"]) == packages_on_disk()
    folders = {package: package.removeprefix("dsg.").replace(".", "/") for package in setuptools["packages"]}
    assert setuptools["package-dir"] == folders


@pytest.mark.parametrize("package", [*MAY_IMPORT, *MAY_IMPORT_ALL])
def test_imports_run_one_way(package: str) -> None:
    folder = ROOT / package.removeprefix("dsg.").replace(".", "/")
    modules = list(folder.glob("*.py"))
    assert modules, f"{folder} holds no module"
    wrong = {path.name: bad for path in modules if (bad := violations(package, path.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("dsg.ops", "from dsg.model.network.types import Proposals"),
        ("dsg.model.network", "import dsg.model.data.coco"),
        ("dsg.model.network", "from dsg.model import data"),
        ("dsg.model.data", "def f():\n    from dsg.model.training import ema"),
        ("dsg.model.training", "from dsg.service.settings import Settings"),
        ("dsg.export", "import dsg.service"),
        ("dsg.service", "from dsg.model.training.run import train"),
        ("dsg.service", "from dsg.cli.main import main"),
        ("dsg.ops", "from . import masks"),
    ],
)
def test_a_wrong_import_is_seen(package: str, source: str) -> None:
    assert violations(package, source)


def test_right_imports_pass() -> None:
    assert not violations("dsg.service", "import json\nfrom dsg.model import load\nfrom dsg.export import runtime")
    assert not violations("dsg.cli", "from dsg.service.settings import Settings")


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*ROOMS, "tests")}
    assert not {name: length for name, length in lengths.items() if length > HARD_STOP}


def test_no_drawers() -> None:
    stems = [path.stem for path in sources(*ROOMS, "tests")]
    drawers = {"utils", "util", "misc", "helpers", "common"}
    assert not [stem for stem in stems if stem.endswith(("_legacy", "_utils")) or stem in drawers]


def test_names_of_test_files_are_unique() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
