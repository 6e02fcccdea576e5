"""A batch as few storages, for the way from a worker to the device."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

Batch = tuple[list[Tensor], list[dict[str, Any]]]
"""Images and their targets, as `Sample` describes both."""


class PackedBatch:
    """A batch with all tensors of a dtype in one storage.

    Each storage that a worker hands over costs an open file while the batch lives, and each that goes to a GPU a copy
    and a lock: one for every tensor would run into the usual limit of 1024 files with a few workers, and keep the
    training process busy with thousands of small things.
    """

    def __init__(self, batch: Batch) -> None:
        images, targets = batch
        self._count = len(images)
        tensors = images + [value for target in targets for value in target.values() if isinstance(value, Tensor)]
        # None stands for a tensor, so that the keys keep their order.
        self._targets = [{k: None if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
        self._places = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self._flat = {
            dtype: torch.cat([tensor.reshape(-1) for tensor in tensors if tensor.dtype == dtype])
            for dtype in {tensor.dtype for tensor in tensors}
        }

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory; what a DataLoader calls."""
        self._flat = {dtype: flat.pin_memory() for dtype, flat in self._flat.items()}
        return self

    def to(self, device: torch.device) -> "PackedBatch":
        """The same on a device; from page-locked memory without waiting for it."""
        self._flat = {dtype: flat.to(device, non_blocking=True) for dtype, flat in self._flat.items()}
        return self

    def unpack(self) -> Batch:
        """Images and targets, each tensor a view of its storage."""
        used: Counter[torch.dtype] = Counter()
        tensors = []
        for dtype, shape in self._places:
            start, used[dtype] = used[dtype], used[dtype] + shape.numel()
            tensors.append(self._flat[dtype][start : used[dtype]].view(shape))
        rest = iter(tensors[self._count :])
        targets = [{k: next(rest) if v is None else v for k, v in target.items()} for target in self._targets]
        return tensors[: self._count], targets
