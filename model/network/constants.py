"""Small tensors of fixed numbers, made once a device: bringing each of them there again holds a GPU's queue up."""

from functools import lru_cache

import torch
from torch import Tensor

from dsg.model.network.tracing import is_traced


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:  # -> [len(values)]
    """A tensor of these numbers in the dtype and on the device of `like`; not to be written to."""
    if torch.compiler.is_compiling():
        # torch.export keeps a tensor made of numbers on the CPU, where a package compiled for a GPU crashes on it.
        return torch.stack([like.new_full((), value) for value in values])
    if is_traced():  # a recorded graph holds its own
        return like.new_tensor(values)
    return _constant(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may come upon it later
        return torch.tensor(values, dtype=dtype, device=device)
