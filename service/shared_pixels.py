"""Pixels that two processes see: written once, by the thread that prepared a picture, and copied nowhere.

They lie in segments of anonymous memory, which are used again for later pictures: memory that the system has to find
and clear takes seven times as long to write, a worker maps each segment once, and a GPU copies from one that it knows
without a detour. A segment goes when its last holder does, also when one of them is killed. Nothing is left in
/dev/shm, whose size containers limit.
"""

import itertools
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage

_LEAST_BYTES = 1 << 18
# Of free segments. What a rush has used serves the next one: a GPU lets go of a segment only when what it runs has
# ended, 17 to 28 ms during which no batch is launched.
_KEPT_BYTES = 1 << 29


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


class Segment:
    """Memory that pictures lie in, one after the other."""

    _numbers = itertools.count()

    def __init__(self, size: int) -> None:
        self.number = next(self._numbers)
        """No other of this process has it, ever."""
        self.size = size
        self.file = os.memfd_create("dsg-pictures")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, size)


# The one that was given back last is the last. A deque, since a picture may go, and give its segment back, in the
# middle of whatever a thread does: each step on it is whole, and no lock is held that this very thread might wait for.
_free: deque[Segment] = deque()


def _take(size: int) -> Segment:
    size = max(_LEAST_BYTES, 1 << (size - 1).bit_length())  # few sizes, so that a free one fits
    for segment in reversed(list(_free)):
        if segment.size == size:
            with suppress(ValueError):  # another thread was quicker
                _free.remove(segment)
                return segment
    return Segment(size)


def _give_back(segment: Segment) -> None:
    _free.append(segment)
    while sum(one.size for one in list(_free)) > _KEPT_BYTES:
        with suppress(IndexError):  # another thread took the last one
            _free.popleft()


class SharedPixels:
    """Stands in a prepared picture where its pixels were, and holds their segment.

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
        self.segment = _take(lying.nbytes)
        weakref.finalize(self, _give_back, self.segment)
        rest = lying.data.cast("B")
        while rest:
            rest = rest[os.pwrite(self.segment.file, rest, lying.nbytes - len(rest)) :]


def share(picture: "PreparedImage") -> "PreparedImage":
    """The same picture with its pixels in shared memory."""
    pixels: Any = SharedPixels(picture.pixels)
    return replace(picture, pixels=pixels)


class OpenSegments:
    """Segments of another process, each mapped once.

    Args:
        device: of torch, where a GPU is to copy from them.
    """

    def __init__(self, device: str) -> None:
        self._device = device if device.startswith("cuda") else None
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._registered: set[int] = set()

    def add(self, number: int, file: int) -> None:
        """Map the segment in a descriptor, which is closed."""
        try:
            memory = mmap.mmap(file, 0)
        finally:
            os.close(file)
        self._memory[number] = np.frombuffer(memory, np.uint8)  # holds the mapping
        if self._device is not None:
            self._register(number)

    def forget(self, numbers: Iterable[int]) -> None:
        """Let go of segments that no picture will lie in again, and that no batch reads."""
        for number in numbers:
            memory = self._memory.pop(number)
            if number in self._registered:
                import torch

                self._registered.remove(number)
                torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)

    def pixels(self, number: int, layout: Layout) -> Any:
        """What lies in a segment now: a tensor or an array, as it was."""
        dtype = np.dtype(layout.dtype)
        size = int(np.prod(layout.shape)) * dtype.itemsize
        array = self._memory[number][:size].view(dtype).reshape(layout.shape).transpose(layout.axes)
        if not layout.is_tensor:
            return array
        import torch

        return torch.from_numpy(array)

    def _register(self, number: int) -> None:
        """Let the GPU read a segment by itself; where the system does not allow that, torch copies it first."""
        import torch

        memory = self._memory[number]
        # A GPU that is lost says so when the batch runs.
        with suppress(RuntimeError), torch.cuda.device(self._device):
            portable = 1  # for all GPUs
            if int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, portable)) == 0:
                self._registered.add(number)
