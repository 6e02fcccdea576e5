"""float32 that is float32 on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole_float32() -> Iterator[None]:
    """Convolutions of float32 in float32: TF32, torch's default on a GPU, keeps ten bits, and what is rounded away
    differs with the size of the batch, so that a picture's masks would depend on the others.

    TorchScript writes down what holds while it is traced; other programs ask when they run.
    """
    cudnn: Any = torch.backends.cudnn
    if cudnn.conv.fp32_precision != "tf32":
        yield
        return
    cudnn.allow_tf32 = False  # not by the newer name: torch.export stops where the two disagree
    try:
        yield
    finally:
        cudnn.allow_tf32 = True
