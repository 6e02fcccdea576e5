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
    """Of the bytes as they lie."""
    axes: tuple[int, ...]
    """Which of them is the first axis of the picture, and so on."""
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
        array: NDArray[Any] = pixels.numpy() if is_tensor else np.asarray(pixels)
        # A decoder's rows, columns, colours, seen as colours, rows, columns, are written as they lie: turned round they
        # would take several times as long.
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        lying = np.ascontiguousarray(array.transpose(order))
        self.layout = Layout(lying.shape, tuple(map(order.index, range(array.ndim))), array.dtype.str, is_tensor)
        self.file = os.memfd_create("dsg-picture")
        weakref.finalize(self, os.close, self.file)
        rest = lying.data.cast("B")
        while rest:
            rest = rest[os.write(self.file, rest) :]


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
    lying = np.frombuffer(memory, np.dtype(layout.dtype)).reshape(layout.shape)  # holds the mapping
    array = lying.transpose(layout.axes)
    if not layout.is_tensor:
        return array
    import torch

    return torch.from_numpy(array)
