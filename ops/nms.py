"""Greedy non-maximum suppression of a batch. B images, N boxes of an image, by falling score."""

from __future__ import annotations

import torch
from torch import Tensor

from dsg.ops import _register  # noqa: F401  registers torch.ops.dsg


def after_all(scores: Tensor) -> float:
    """What sorts after every score, in the place of minus infinity: with infinities onnxruntime's TopK on a GPU makes
    up values and indices."""
    return torch.finfo(scores.dtype).min / 2  # the least of all is what that TopK pads with


def batched_nms(
    boxes: Tensor,  # [B, N, 4] xyxy
    scores: Tensor,  # [B, N]
    groups: Tensor,  # int64 [B, N]
    valid: Tensor,  # bool [B, N]
    iou_threshold: float,
) -> Tensor:  # bool [B, N]
    """Which boxes stay when, from the best score down, each removes those of its image and group that overlap it.

    Args:
        boxes: float32 or float64, compared in that precision.
        scores: any floats; of equal ones the first in the row goes first.
        groups: boxes of different groups do not touch each other: pyramid levels, or classes.
        valid: rows that are False neither stay nor remove anything.
        iou_threshold: overlaps above it, not equal to it, remove; as in torchvision.

    Returns:
        bool Tensor[B, N] in the order of the boxes.

    Raises:
        ValueError: shapes that do not go together.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [B, N, 4], got {list(boxes.shape)}")
    for name, tensor in (("scores", scores), ("groups", groups), ("valid", valid)):
        if tensor.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must be [B, N] = {list(boxes.shape[:2])}, got {list(tensor.shape)}")
    order = scores.masked_fill(~valid, after_all(scores)).argsort(dim=1, descending=True, stable=True)  # [B, N]
    by_score = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    kept = torch.ops.dsg.batched_nms(by_score, groups.gather(1, order), valid.gather(1, order), float(iou_threshold))
    return torch.zeros_like(valid).scatter(1, order, kept)
