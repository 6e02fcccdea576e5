"""Between pictures and the padded arrays of an exported graph. Needs no torch.

B images, H and W their padded size, h, w size of a resized picture, K detections of an image, m side of a mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsg.model.network.detections import Detections
from dsg.model.network.predictor import PreparedImage
from dsg.model.network.sizes import padded_size


def stack_arrays(pictures: Sequence[NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Resized pictures into one batch, zeros right and below.

    Args:
        pictures: [3, h, w] each, uint8 or float32 in 0..1.

    Returns:
        float32 [B, 3, H, W] in 0..1 with sides that are multiples of 32, and int64 [B, 2]: (height, width) of each.
    """
    sizes = np.array([picture.shape[-2:] for picture in pictures], dtype=np.int64)  # [B, 2]
    height, width = padded_size(*sizes.max(axis=0).tolist())
    batch = np.zeros((len(pictures), 3, height, width), dtype=np.float32)
    for picture, place in zip(pictures, batch, strict=True):
        inside = place[:, : picture.shape[1], : picture.shape[2]]
        if picture.dtype == np.uint8:
            np.divide(picture, np.float32(255), out=inside)
        else:
            inside[:] = picture
    return batch, sizes


def detections_of(
    outputs: Mapping[str, NDArray[Any]], prepared: Sequence[PreparedImage], score_threshold: float
) -> list[Detections]:
    """The rows of each picture that are detections and score enough, in pixels of the original picture.

    Args:
        outputs: valid [B, K], boxes [B, K, 4], scores [B, K], labels [B, K], mask_probs [B, K, m, m].
        prepared: the B pictures of the batch.
        score_threshold: 0..1.
    """
    found = []
    wanted = outputs["valid"] & (outputs["scores"] >= score_threshold)  # [B, K]
    for number, picture in enumerate(prepared):
        rows = np.flatnonzero(wanted[number])  # [n]
        height, width = picture.original_size
        resized_height, resized_width = picture.size
        ratio_y, ratio_x = (
            np.float32(height) / np.float32(resized_height),
            np.float32(width) / np.float32(resized_width),
        )
        boxes = outputs["boxes"][number, rows] * np.array([ratio_x, ratio_y, ratio_x, ratio_y])  # [n, 4]
        scores, labels, masks = (outputs[name][number, rows] for name in ("scores", "labels", "mask_probs"))
        found.append(Detections(boxes, scores, labels, masks, (height, width)))
    return found
