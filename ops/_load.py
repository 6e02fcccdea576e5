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
    """Loads the libraries that are there on the first call; says which of "cpu" and "cuda" have a kernel.

    A library that does not load costs a warning, not the process: plain PyTorch takes over.
    `DSG_OPS=reference` loads none, to compare or to rule the kernels out.
    """
    loaded = []
    if os.environ.get("DSG_OPS", "") != "reference":
        for device, name in LIBRARIES.items():
            path = Path(__file__).with_name(name)
            if not path.exists() or (device == "cuda" and torch.version.cuda is None):
                continue
            try:
                torch.ops.load_library(path)
            except (OSError, RuntimeError) as error:
                logger.warning("%s does not load (%s); plain PyTorch runs instead", path, _first_line(error))
            else:
                loaded.append(device)
    logger.info("SgRoIAlign runs as: %s", _describe(loaded))
    return tuple(loaded)


def kernel_name() -> str:
    """What runs: "cuda+cpu kernels", "cuda kernel", "cpu kernel" or "plain PyTorch"."""
    return _describe(list(loaded_kernels()))


def _describe(loaded: list[str]) -> str:
    names = {0: "plain PyTorch", 1: f"{''.join(loaded)} kernel", 2: "cuda+cpu kernels"}
    return names[len(loaded)]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
