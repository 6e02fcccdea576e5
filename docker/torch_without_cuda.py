"""Installs the usual index's torch for a machine without a GPU: `torch_without_cuda.py REQUIREMENTS`

torch on PyPI is linked against NVIDIA's libraries, 3 GB that come as packages of their own, and does not load where one
is missing. None of their functions does anything before a GPU is found. So torch is installed without these packages,
and in place of each library stands one of a few kilobytes whose functions fail with 100, CUDA's "no device". torch then
says, as on every machine without a GPU, that CUDA is not available.

A package index with builds for the CPU alone (TORCH_INDEX) gives a smaller torch and needs none of this.
Needs gcc and readelf.
"""

import re
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import distribution, requires
from pathlib import Path
from tempfile import TemporaryDirectory

_LIBRARY = re.compile(r"\(NEEDED\).*\[(lib(cu|nv|nccl)[^\]]*)\]")
_FUNCTION = re.compile(r"FUNC +GLOBAL +DEFAULT +UND ((?:__)?(?:cu|nv|nccl)\w+)(?:@(\S+))?")
_GIVES_TEXT = re.compile(r"(String|Name)$")  # whoever calls it follows the result as an address
_NO_DEVICE = 100
_OF_THE_DRIVER = "libcuda.so.1"  # wanted by a library that nothing loads without a GPU


def main(requirements: str) -> None:
    wanted = Path(requirements).read_text(encoding="utf-8").split()
    pip("install", "--no-deps", *wanted)
    needs = {on_a_cpu(need) for package in ("torch", "torchvision") for need in requires(package) or []}
    pip("install", *sorted(needs - {""}))
    folder = Path(str(distribution("torch").locate_file("torch/lib")))
    if (folder / "libtorch_cuda.so").exists():
        stand_in(folder)
        (folder / "libtorch_cuda_linalg.so").unlink(missing_ok=True)  # loaded for the first matrix on a GPU
    import torch

    sys.stderr.write(f"torch {torch.__version__}, CUDA available: {torch.cuda.is_available()}\n")


def on_a_cpu(need: str) -> str:
    """A requirement without its condition; empty for one that a CPU can do without."""
    name, _, condition = (part.strip() for part in need.partition(";"))
    return "" if "extra" in condition or re.match(r"torch\b|triton|cuda-|nvidia-", name) else name


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def stand_in(folder: Path) -> None:
    """Put a library in place of each that is missing, with all functions of it that the others call."""
    missing: set[str] = set()
    functions: dict[str, set[str]] = defaultdict(set)  # version -> names
    for library in sorted(folder.glob("*.so")):
        missing |= {name for name, _ in _LIBRARY.findall(readelf("-d", library)) if not (folder / name).exists()}
        for name, version in _FUNCTION.findall(readelf("--dyn-syms", library)):
            functions[version].add(name)
    for library_name in sorted(missing - {_OF_THE_DRIVER}):
        # Most of these libraries give their functions their own name as version; NVSHMEM a shorter one, some none.
        of_all = [one for one in functions if one == library_name or library_name.startswith(f"lib{one.lower()}_")]
        version = of_all[0] if of_all else ""
        prefix = library_name.removeprefix("lib").partition(".")[0].lower()
        names = functions[version] if version else {n for n in functions[""] if n.lower().startswith(prefix)}
        build(folder / library_name, version, sorted(names))
        sys.stderr.write(f"{library_name}: {len(names)} functions that fail\n")


def readelf(option: str, library: Path) -> str:
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build(path: Path, version: str, names: list[str]) -> None:
    text, code = '{ return "there is no CUDA here"; }', f"{{ return {_NO_DEVICE}; }}"
    source = [f"const char *{n}(void) {text}" if _GIVES_TEXT.search(n) else f"int {n}(void) {code}" for n in names]
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "source.c").write_text("\n".join([*source, "int dsg_no_cuda;", ""]))
        (Path(scratch) / "versions").write_text(f"{version} {{ global: *; }};\n")
        versions = ["-Wl,--version-script=versions"] if version else []
        command = ["gcc", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{path.name}", *versions, "source.c"]
        subprocess.run([*command, "-o", str(path)], cwd=scratch, check=True)


if __name__ == "__main__":
    main(sys.argv[1])
