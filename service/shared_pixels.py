"""Pixels that two processes see: written once, by the thread that prepared a picture, and copied nowhere.

They lie in anonymous memory that goes when its last holder does, also when one of them is killed. Nothing is left in
/dev/shm, whose size containers limit.
"""

import mmap
import os
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage


@dataclass(frozen=True)
class Layout:
    """What the bytes are."""

    shape: tuple[int, ...]
    dtype: str
    is_tensor: bool
    """A torch tensor, and not a numpy array."""


class SharedPixels:
    """Stands in a prepared picture where its pixels were.

    Args:
        pixels: a torch tensor on the CPU, or a numpy array.
    """

    def __init__(self, pixels: Any) -> None:
        is_tensor = hasattr(pixels, "numpy")
        array = pixels.numpy() if is_tensor else np.asarray(pixels)
        self.layout = Layout(array.shape, array.dtype.str, is_tensor)
        self.file = os.memfd_create("dsg-picture")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, array.nbytes)
        with mmap.mmap(self.file, array.nbytes) as memory:
            target: NDArray[Any] = np.frombuffer(memory, array.dtype).reshape(array.shape)
            np.copyto(target, array)
            del target  # a mapping cannot close while something looks into it


def share(picture: "PreparedImage") -> "PreparedImage":
    """The same picture with its pixels in shared memory."""
    pixels: Any = SharedPixels(picture.pixels)
    return replace(picture, pixels=pixels)


def open_shared(file: int, layout: Layout) -> Any:
    """The pixels in a descriptor, which is closed: a tensor or an array, as it was."""
    try:
        memory = mmap.mmap(file, 0)
    finally:
        os.close(file)
    array = np.frombuffer(memory, np.dtype(layout.dtype)).reshape(layout.shape)  # holds the mapping
    if not layout.is_tensor:
        return array
    import torch

    return torch.from_numpy(array)
