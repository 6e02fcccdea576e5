"""Why torch, the driver or the GPU of a machine will not do, in one line that says what to do about it."""

from __future__ import annotations

import ctypes
import re
import warnings

import torch

OLDEST_TORCH = (2, 11)
"""The first with all that the kernels' stable ABI needs."""
OLDEST_GPU = (7, 5)
"""Compute capability that the kernels are compiled for; `setup.py` has the others."""


def torch_problem(version: str) -> str | None:
    """Why a version of torch will not do, or None.

    Args:
        version: such as `2.14.1+cu130`.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= OLDEST_TORCH:
        return None
    wanted = ".".join(map(str, OLDEST_TORCH))
    return f"torch {version} is too old, {wanted} or later is needed: pip install --upgrade 'dsg[torch]'"


def gpu_problem(index: int = 0) -> str | None:
    """Why a GPU that is in this machine cannot be used, or None where it can, or where there is none.

    Args:
        index: which GPU, as torch counts them.
    """
    driver = driver_cuda()
    if driver is None:
        return None
    has = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{has} is a build for the CPU alone, and there is an NVIDIA driver: install a torch with CUDA to use it"
    wanted = tuple(map(int, torch.version.cuda.split(".")))
    if driver[0] < wanted[0]:
        # Within one major version of CUDA, an older driver runs what was built with a newer one.
        known = f"the NVIDIA driver knows CUDA {driver[0]}.{driver[1]} at most"
        what_to_do = f"update the driver, or install a torch for CUDA {driver[0]}"
        return f"{has} was built with CUDA {torch.version.cuda}, and {known}: too old; {what_to_do}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says over several lines what is said here in one
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return None
        capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
    archs = [int(arch.partition("_")[2].rstrip("af")) for arch in torch.cuda.get_arch_list()]
    oldest = max(divmod(min(archs), 10), OLDEST_GPU) if archs else OLDEST_GPU
    if capability < oldest:
        has = f"{name} has compute capability {capability[0]}.{capability[1]}"
        return f"{has}, too old: {oldest[0]}.{oldest[1]} or later is needed; --device cpu runs without it"
    return None


def driver_cuda() -> tuple[int, int] | None:
    """The CUDA version that the NVIDIA driver of this machine knows; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int(0)
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10
