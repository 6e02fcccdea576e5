"""One line about a torch, a driver or a GPU that will not do."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsg.model.network.eager import present_device
from dsg.ops import diagnosis


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu128", "2.14.1", "3.0.0a0+git1234", "10.0.1", "unknown"])
def test_a_torch_that_will_do(version: str) -> None:
    assert diagnosis.torch_problem(version) is None


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu130", "1.13.1", "2.2.0a0"])
def test_a_torch_that_is_too_old(version: str) -> None:
    said = diagnosis.torch_problem(version)
    assert said == f"torch {version} is too old, 2.11 or later is needed: pip install --upgrade 'dsg[torch]'"


def test_the_oldest_torch_is_that_of_the_kernels_and_of_the_metadata() -> None:
    root = Path(__file__).parents[2]
    major, minor = diagnosis.OLDEST_TORCH
    assert f'TARGET_TORCH = "0x{major:02x}{minor:02x}000000000000"' in (root / "setup.py").read_text()
    assert f'torch = ["torch>={major}.{minor}"' in (root / "pyproject.toml").read_text()
    major, minor = diagnosis.OLDEST_GPU
    assert f'ALL_ARCHS = "{major}{minor},' in (root / "setup.py").read_text()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine one with a driver and a GPU, as torch and the driver would describe them."""

    def has(
        driver: tuple[int, int] | None = (13, 0),
        capability: tuple[int, int] = (9, 0),
        built_with: str | None = "13.0",
        archs: tuple[str, ...] = ("sm_75", "sm_90", "sm_100a", "compute_120"),
    ) -> None:
        monkeypatch.setattr(diagnosis, "driver_cuda", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", built_with)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: driver is not None and built_with is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*archs])

    return has


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"driver": (13, 2)},
        {"driver": (13, 0), "built_with": "13.2"},  # one major version: the driver runs it
        {"driver": (14, 0)},
        {"driver": None},
        {"capability": (7, 5)},
        {"capability": (12, 1)},
        {"archs": ()},
    ],
)
def test_a_machine_that_will_do(gpu: Any, machine: dict[str, Any]) -> None:
    gpu(**machine)
    assert diagnosis.gpu_problem() is None
    assert present_device(None).type == ("cpu" if machine.get("driver", 1) is None else "cuda")


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"driver": (12, 4)}, "the NVIDIA driver knows CUDA 12.4 at most: too old; update the driver"),
        ({"driver": (11, 8), "built_with": "12.6"}, "install a torch for CUDA 11"),
        ({"capability": (6, 1)}, "Some GPU has compute capability 6.1, too old: 7.5 or later is needed"),
        ({"capability": (7, 0), "archs": ("sm_50", "sm_90")}, "7.5 or later is needed"),  # the op's own bound
        ({"capability": (7, 5), "archs": ("sm_80", "sm_90")}, "8.0 or later is needed"),
        ({"built_with": None}, "is a build for the CPU alone"),
    ],
)
def test_a_machine_that_will_not(
    gpu: Any, caplog: pytest.LogCaptureFixture, machine: dict[str, Any], said: str
) -> None:
    gpu(**machine)
    problem = diagnosis.gpu_problem()
    assert problem is not None and said in problem and "\n" not in problem
    with pytest.raises(ValueError) as caught:
        present_device("cuda")
    assert str(caught.value) == problem
    # Where no one asked for a GPU, there is the CPU, and a line about it.
    assert present_device(None) == torch.device("cpu")
    assert [record.message for record in caplog.records] in ([f"{problem}; running on the CPU"], [])


_DRIVER = """
int cuInit(unsigned int flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = %d; return 0; }
"""


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    """Compiles a driver that knows CUDA up to a version, and gives an environment that finds it first."""

    def make(version: int) -> dict[str, str]:
        (tmp_path / "driver.c").write_text(_DRIVER % version)
        library = tmp_path / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(library)], check=True)
        return {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}

    if shutil.which("gcc") is None:
        pytest.skip("no gcc here")
    return make


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch for the CPU alone")
def test_dsg_says_it_in_one_line(driver: Any, tmp_path: Path) -> None:
    environment = driver(12040)
    command = [sys.executable, "-m", "dsg.cli", "predict", str(tmp_path / "no.png"), "--device", "cuda"]
    (tmp_path / "no.png").write_bytes(b"")
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("dsg: error: torch ") and "knows CUDA 12.4 at most: too old" in line


def test_no_driver_and_a_broken_one_are_none(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, broken = ctypes.CDLL, tmp_path / "libcuda.so.1"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(broken)))
    assert diagnosis.driver_cuda() is None  # there is none yet
    broken.write_bytes(b"no library")
    assert diagnosis.driver_cuda() is None
    broken.unlink()
    driver(12040)
    assert diagnosis.driver_cuda() == (12, 4)


@pytest.mark.gpu
def test_the_gpu_of_this_machine_will_do() -> None:
    assert diagnosis.driver_cuda() is not None and diagnosis.gpu_problem() is None
    assert present_device(None).type == "cuda"
