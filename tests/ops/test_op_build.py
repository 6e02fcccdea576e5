"""Building and loading the kernels: what setup.py makes, what it says where it can't, and plain PyTorch instead."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsg.ops import _load

ROOT = Path(__file__).parents[2]
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or torch.version.cuda is None, reason="no nvcc, or a torch without CUDA, here"
)


def build(folder: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            str(folder / "lib"),
            "--build-temp",
            str(folder / "temp"),
        ],
        cwd=ROOT,
        env=os.environ | {"DSG_BUILD_OPS": mode, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def loads(library: Path) -> str:
    """Loads it in a process of its own beside the schemas; the keys that it gave kernels to."""
    code = (
        "import sys, torch, dsg.ops; torch.ops.load_library(sys.argv[1]);"
        "print(torch._C._dispatch_dump('dsg::multiscale_sg_roi_align_backward'))"
    )
    environment = os.environ | {"DSG_OPS": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], env=environment, text=True, capture_output=True, check=True
    )
    return done.stdout


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], text=True, capture_output=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


@needs_compiler
def test_cpu_kernel_builds_once_and_loads(tmp_path: Path) -> None:
    done = build(tmp_path, "cpu")
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout
    library = tmp_path / "lib" / "dsg" / "ops" / "_C_cpu.so"
    assert "csrc/cpu/sg_roi_align_cpu.cpp" in loads(library)
    if shutil.which("nm"):
        # Only torch's C functions: a mangled c10 or at symbol would tie the library to one torch.
        assert not [name for name in undefined_symbols(library) if name.startswith(("_ZN3c10", "_ZN2at", "_ZN5torch"))]
    again = build(tmp_path, "cpu")
    assert "up to date" in again.stdout


@needs_compiler
def test_auto_says_what_it_left_out(tmp_path: Path) -> None:
    done = build(tmp_path, "auto", CXX="/no/such/compiler", CUDA_HOME="/no/such/toolkit")
    assert done.returncode == 0, done.stdout
    assert "the cpu kernel was not built: no C++ compiler (/no/such/compiler)" in done.stdout
    assert "the cuda kernel was not built: no nvcc" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cpu", "error: the cpu kernel can't be built: no C++ compiler (/no/such/compiler)"),
        ("fast", "error: DSG_BUILD_OPS must be one of off, cpu, cuda, auto, got 'fast'"),
    ],
)
def test_what_was_asked_for_and_fails_is_an_error(tmp_path: Path, mode: str, message: str) -> None:
    done = build(tmp_path, mode, CXX="/no/such/compiler")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == message


def test_off_builds_nothing(tmp_path: Path) -> None:
    done = build(tmp_path, "off")
    assert done.returncode == 0, done.stdout
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_cuda_kernel_builds_and_loads(tmp_path: Path) -> None:
    done = build(tmp_path, "cuda", DSG_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stdout
    library = tmp_path / "lib" / "dsg" / "ops" / "_C_cuda.so"
    assert "csrc/cuda/sg_roi_align_cuda.cu" in loads(library)
    assert not [name for name in undefined_symbols(library) if name.startswith(("_ZN3c10", "_ZN2at", "_ZN5torch"))]


ORT_INCLUDE = Path(os.environ.get("DSG_ORT_INCLUDE") or ROOT / "build/onnxruntime/out/usr/include/onnxruntime")


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not (ORT_INCLUDE / "onnxruntime_cxx_api.h").is_file(), reason="no headers: make onnx-ops gets them")
@pytest.mark.parametrize("mode", ["cpu", pytest.param("cuda", marks=needs_nvcc)])
def test_onnxruntime_kernels_are_one_library_that_needs_neither_torch_nor_cuda(tmp_path: Path, mode: str) -> None:
    import onnxruntime

    done = build(tmp_path, mode, DSG_ORT_INCLUDE=str(ORT_INCLUDE), DSG_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stdout
    library = tmp_path / "lib" / "dsg" / "ops" / "_C_onnxruntime.so"
    onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    linked = subprocess.run(["ldd", str(library)], text=True, capture_output=True, check=True).stdout
    assert not [line for line in linked.splitlines() if "torch" in line or "cuda" in line or "c10" in line]
    assert not [name for name in undefined_symbols(library) if name.startswith(("aoti", "torch", "cuda", "_ZN3c10"))]


@needs_compiler
def test_missing_headers_of_onnxruntime_are_named(tmp_path: Path) -> None:
    done = build(tmp_path, "auto", CXX="/no/such/compiler", CUDA_HOME="/no/such/toolkit", DSG_ORT_INCLUDE="/nowhere")
    assert done.returncode == 0 and "no onnxruntime_cxx_api.h in DSG_ORT_INCLUDE=/nowhere" in done.stdout


@pytest.mark.slow
@needs_nvcc
def test_architectures_must_be_numbers(tmp_path: Path) -> None:
    done = build(tmp_path, "cuda", DSG_CUDA_ARCHS="hopper")
    assert done.returncode == 1
    assert 'error: DSG_CUDA_ARCHS must be "all" or like "80,90", got \'hopper\'' in done.stdout


def test_library_that_does_not_load_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "_C_cpu.so").write_bytes(b"no library")
    with caplog.at_level(logging.WARNING, logger="dsg.ops"):
        assert _load.load_kernels(tmp_path) == ()
    (record,) = caplog.records
    assert "_C_cpu.so does not load" in record.getMessage()
    assert "plain PyTorch runs instead" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_folder_without_libraries_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _load.load_kernels(tmp_path) == ()
    assert not caplog.records


def test_which_kernel_runs_is_logged_once() -> None:
    code = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(name)s: %(message)s');"
        "from dsg.ops import kernel_name; kernel_name(); kernel_name()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DSG_OPS": "reference"},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stderr.count("dsg.ops: SgRoIAlign runs as: plain PyTorch") == 1


@pytest.mark.skipif(_load.kernel_name() == "plain PyTorch", reason="the whole suite runs on plain PyTorch here")
def test_ops_without_any_kernel_pass_the_same_checks() -> None:
    """PyTorch's op checks again, in a process where torch.ops.dsg.* are plain PyTorch."""
    tests = Path(__file__).with_name("test_op_registration.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests), "-k", "opcheck or gradcheck or needed or raise"],
        cwd=ROOT,
        env=os.environ | {"DSG_OPS": "reference"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
