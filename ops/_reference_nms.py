"""Greedy suppression in plain PyTorch: the specification, and what runs where no compiled kernel is.

B images, N boxes of an image, by falling score.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batched_nms(
    boxes: Tensor,  # [B, N, 4]
    groups: Tensor,  # int64 [B, N]
    valid: Tensor,  # bool [B, N]
    iou_threshold: float,
) -> Tensor:  # bool [B, N]
    """A box stays if no box that stays, comes before it and is of its group overlaps it by more than the threshold."""
    keep = torch.zeros_like(valid)
    for image in range(len(boxes)):
        keep[image] = _one(boxes[image], groups[image], valid[image], iou_threshold)
    return keep


def _one(boxes: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # [N]
    sides = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
    shared = sides.clamp(min=0).prod(dim=2)  # [N, N]
    overlapping = shared / (area[:, None] + area - shared) > iou_threshold  # 0 / 0 is above nothing
    suppresses = (overlapping & (groups[:, None] == groups)).triu(diagonal=1)  # [N, N]: the row removes the column
    # Who stays depends on who before it stays. Each round settles at least one more box from the top down, and in
    # practice nearly all after a few, since chains of boxes that remove each other are short.
    stays = valid
    for _ in range(len(valid)):
        now = valid & ~(suppresses & stays[:, None]).any(dim=0)
        if torch.equal(now, stays):
            break
        stays = now
    return stays
