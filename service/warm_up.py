"""What is run before a model is served: a network's first runs are slow, and no client should wait for them."""

from typing import TYPE_CHECKING

import numpy as np

from dsg.service.models import ServedModel

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage

# (height, width) of the pictures that most cameras and phones make; their buckets are the first that traffic wants.
_SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (360, 640))
_GREY = 114


def warm_up_batches(
    model: ServedModel, max_batch: int, max_batch_pixels: int, on_gpu: bool
) -> "list[list[PreparedImage]]":
    """Batches to run on each device.

    On a CPU one picture is enough. On a GPU kernels are chosen and memory is set apart for each shape, and for large
    batches; what does not fit shows here, and not to a client.
    """
    if not on_gpu:
        return [[_prepared(model, _SIZES[0])]]
    batches = []
    for size in _SIZES:
        picture = _prepared(model, size)
        height, width = picture.padded_size
        most = max(1, min(max_batch, max_batch_pixels // (height * width)))
        batches += [[picture], [picture], [picture] * most]  # the second of a shape is recorded, see network/replay.py
    return batches


def _prepared(model: ServedModel, size: tuple[int, int]) -> "PreparedImage":
    return model.prepare(np.full((*size, 3), _GREY, np.uint8))
