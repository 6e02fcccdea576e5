"""Builds the compiled kernels of dsg.ops; all else about the package is in pyproject.toml.

DSG_BUILD_OPS   off (default): no kernel, plain PyTorch runs. cpu: the CPU kernel. cuda: the CPU and the CUDA
                kernel. auto: what this machine can build and use, and one line about each that it can't.
DSG_ORT_INCLUDE a folder with onnxruntime_cxx_api.h (1.21 or later): builds the op's kernels for onnxruntime too,
                for the CPU, and for CUDA in the same library where DSG_BUILD_OPS says cuda, or says auto and there
                is an nvcc. `make onnx-ops` fetches the headers.
DSG_CUDA_ARCHS  for instance "80,90": compute capabilities to compile for; "all": 7.5 to 12.0, with PTX for
                later ones. Default: that of the GPUs in this machine, or all where there is none.
CXX, CUDA_HOME  another compiler, another CUDA toolkit.

The libraries use torch's stable ABI: built against one torch, they serve every torch from 2.11 on, with any
Python.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "ops" / "csrc"
ALL_ARCHS = "75,80,86,89,90,100,120"
TARGET_TORCH = "0x020b000000000000"  # 2.11
MODES = ("off", "cpu", "cuda", "auto")


class CannotBuild(Exception):
    """Why a kernel can't be built on this machine, in one line."""


class KernelExtension(Extension):
    """`device`: the folder of its sources: "cpu", "cuda", and for other programs "schemas" and "onnxruntime".

    `optional`: a failure is reported and passed over.
    """

    def __init__(self, device: str, optional: bool) -> None:
        patterns = ["*.cu"] if device == "cuda" else ["*.cpp", "*.cu"]
        found = sorted(path for pattern in patterns for path in (CSRC / device).glob(pattern))
        sources = [str(path.relative_to(ROOT)) for path in found]
        super().__init__(f"dsg.ops._C_{device}", sources, optional=optional)
        self.device = device


class BuildKernels(build_ext):
    """Calls the compiler itself: the libraries are no Python modules and take none of Python's own flags."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        assert isinstance(ext, KernelExtension)
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            make_command = {"cuda": cuda_command, "onnxruntime": onnxruntime_command}.get(ext.device, cpu_command)
            command = make_command(ext)
            self._compile(ext, command, target)
        except CannotBuild as reason:
            if not ext.optional:
                raise SystemExit(f"error: the {ext.device} kernel can't be built: {reason}") from None
            say(f"the {ext.device} kernel was not built: {reason}; it is not needed, only faster")

    def _compile(self, ext: KernelExtension, command: list[str], target: Path) -> None:
        record = Path(self.build_temp) / f"{target.name}.command"
        sources = [path for path in CSRC.rglob("*") if path.is_file()]
        if (
            not self.force
            and target.exists()
            and record.exists()
            and record.read_text() == shlex.join(command)
            and all(path.stat().st_mtime <= target.stat().st_mtime for path in sources)
        ):
            say(f"the {ext.device} kernel is up to date: {target}")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".so.partial")  # a running process never finds half a library
        say(shlex.join(command))
        status = subprocess.run([*command, "-o", str(partial.absolute())], cwd=ROOT).returncode
        if status != 0:
            partial.unlink(missing_ok=True)
            raise CannotBuild(f"{command[0]} failed with status {status}")
        partial.replace(target)
        record.write_text(shlex.join(command))
        say(f"built the {ext.device} kernel: {target}")


class Wheel(bdist_wheel):
    """One wheel for every Python 3: the kernels do not touch Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.has_ext_modules() else (python, abi, platform)


def torch_flags(libraries: tuple[str, ...]) -> list[str]:
    try:
        import torch
    except ImportError:
        raise CannotBuild("torch is not installed here (pip needs --no-build-isolation to see it)") from None
    folder = Path(torch.__file__).parent
    if not (folder / "include/torch/csrc/stable/ops.h").exists():
        raise CannotBuild(f"torch {torch.__version__} has no stable ABI; 2.11 or later is needed")
    if "torch_cuda" in libraries and torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is a build without CUDA")
    linked = [f"-l{library}" for library in libraries]
    return ["-isystem", str(folder / "include"), "-L", str(folder / "lib"), *linked]


CPU_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]


def cpu_command(ext: KernelExtension) -> list[str]:
    keep = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
    defines = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    return [*cpu_compiler(), *CPU_FLAGS, *defines, *ext.sources, *keep, *torch_flags(("torch_cpu",))]


def onnxruntime_command(ext: KernelExtension) -> list[str]:
    """Of torch it takes headers alone; CUDA's runtime is linked in, so that it loads where there is no CUDA."""
    headers = Path(os.environ.get("DSG_ORT_INCLUDE", ""))
    if not (headers / "onnxruntime_cxx_api.h").is_file():
        raise CannotBuild(f"no onnxruntime_cxx_api.h in DSG_ORT_INCLUDE={headers}")
    includes = [*torch_flags(())[:2], "-isystem", str(headers.absolute()), f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
    nvcc = find_nvcc()
    if nvcc is None and os.environ.get("DSG_BUILD_OPS") == "cuda":
        raise CannotBuild("no nvcc (set CUDA_HOME)")
    if nvcc is None or os.environ.get("DSG_BUILD_OPS") == "cpu":
        sources = [source for source in ext.sources if source.endswith(".cpp")]
        return [*cpu_compiler(), *CPU_FLAGS, "-Wno-unused-function", *includes, *sources]
    compiler = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    codes = cuda_codes(cuda_archs(only_present=False))
    options = ["-O3", "-std=c++20", "-shared", "--threads", "0", "-cudart", "static", "-DDSG_WITH_CUDA", "-DUSE_CUDA"]
    return [nvcc, *options, *compiler, *includes, *codes, *ext.sources]


def cpu_compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = next((name for name in (wanted[:1] or ["c++", "g++", "clang++"]) if shutil.which(name)), None)
    if found is None:
        raise CannotBuild(f"no C++ compiler ({' '.join(wanted) or 'c++, g++ or clang++'})")
    return [found, *wanted[1:]]


def cuda_command(ext: KernelExtension) -> list[str]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise CannotBuild("no nvcc (set CUDA_HOME)")
    libraries = torch_flags(("torch_cpu", "torch_cuda"))
    codes = cuda_codes(cuda_archs(only_present=ext.optional))
    flags = [
        "-O3",
        "-std=c++20",
        "-shared",
        "--threads",
        "0",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden,-Wall",
    ]
    defines = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", "-DUSE_CUDA"]
    return [nvcc, *flags, *defines, *codes, *ext.sources, "-Xlinker", "--no-as-needed", *libraries]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")


def cuda_codes(archs: list[str]) -> list[str]:
    codes = []
    for arch in archs:
        codes += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return [*codes, "-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX, for later GPUs


def cuda_archs(only_present: bool) -> list[str]:
    """`only_present`: only for GPUs that are there, unless the user asks for more."""
    asked = os.environ.get("DSG_CUDA_ARCHS", "")
    if not asked:
        import torch

        gpus = range(torch.cuda.device_count())
        present = {"{}{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus}
        if only_present and not present:
            raise CannotBuild("no CUDA GPU here (DSG_CUDA_ARCHS=all builds it all the same)")
        asked = ",".join(sorted(present, key=int)) or "all"
    archs = (ALL_ARCHS if asked == "all" else asked.replace(".", "")).split(",")
    if not all(arch.isdigit() for arch in archs):
        raise SystemExit(f'error: DSG_CUDA_ARCHS must be "all" or like "80,90", got {asked!r}')
    return archs


def say(line: str) -> None:
    sys.stderr.write(f"dsg: {line}\n")


def extensions() -> list[KernelExtension]:
    mode = os.environ.get("DSG_BUILD_OPS", "off")
    if mode not in MODES:
        raise SystemExit(f"error: DSG_BUILD_OPS must be one of {', '.join(MODES)}, got {mode!r}")
    devices = {"off": (), "cpu": ("cpu", "schemas")}.get(mode, ("cpu", "schemas", "cuda"))
    if devices and os.environ.get("DSG_ORT_INCLUDE"):
        devices = (*devices, "onnxruntime")
    return [KernelExtension(device, optional=mode == "auto") for device in devices]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
