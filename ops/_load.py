"""Finds the compiled kernels beside this file and loads them, once."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("dsg.ops")

LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}


@cache
def loaded_kernels() -> tuple[str, ...]:
    """Loads the libraries beside this file on the first call; says which of "cpu" and "cuda" have a kernel.

    `DSG_OPS=reference` loads none, to compare or to rule the kernels out.
    """
    loaded = () if os.environ.get("DSG_OPS") == "reference" else load_kernels(Path(__file__).parent)
    logger.info("SgRoIAlign runs as: %s", _describe(loaded))
    return loaded


def load_kernels(folder: Path) -> tuple[str, ...]:
    """Loads what `folder` holds. A library that does not load costs a warning: plain PyTorch takes over."""
    loaded = []
    for device, name in LIBRARIES.items():
        path = folder / name
        if not path.exists() or (device == "cuda" and torch.version.cuda is None):
            continue
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            first_line = str(error).strip().partition("\n")[0]
            logger.warning("%s does not load (%s); plain PyTorch runs instead", path, first_line)
        else:
            loaded.append(device)
    return tuple(loaded)


def kernel_name() -> str:
    """What runs: "cuda+cpu kernels", "cuda kernel", "cpu kernel" or "plain PyTorch"."""
    return _describe(loaded_kernels())


def _describe(loaded: tuple[str, ...]) -> str:
    if len(loaded) == len(LIBRARIES):
        return "cuda+cpu kernels"
    return f"{loaded[0]} kernel" if loaded else "plain PyTorch"
