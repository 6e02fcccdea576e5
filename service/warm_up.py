"""What is run before a model is served: a network's first runs are slow, and no client should wait for them."""

from typing import TYPE_CHECKING

import numpy as np

from dsg.service.models import ServedModel
from dsg.service.pace import BatchLimit

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage

# (height, width) of the pictures that most phones make. Each further shape would take seconds of every start.
_SIZES = ((480, 640), (640, 480))
_GREY = 114


def warm_up_batches(
    model: ServedModel, max_batch: int, max_batch_pixels: int, on_gpu: bool
) -> "list[list[PreparedImage]]":
    """Batches to run on each device.

    On a CPU one picture is enough. On a GPU kernels are chosen and memory is set apart for each shape and number of
    pictures; what does not fit shows here, and not to a client.
    """
    if not on_gpu:
        return [[_prepared(model, _SIZES[0])]]
    limit = BatchLimit(max_batch, max_batch_pixels, few_sizes=True)
    batches = []
    for size in _SIZES:
        picture = _prepared(model, size)
        height, width = picture.padded_size
        for count in sorted({limit.size(count) for count in range(1, limit.most(height * width) + 1)}):
            batches += [[picture] * count] * 2  # the second of a shape is recorded, see network/replay.py
    return batches


def _prepared(model: ServedModel, size: tuple[int, int]) -> "PreparedImage":
    return model.prepare(np.full((*size, 3), _GREY, np.uint8))
