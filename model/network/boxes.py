"""Arithmetic on boxes (x1, y1, x2, y2): overlaps, offsets, clipping, suppression.

N, M boxes of one image; B images.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from dsg.model.network.constants import constant
from dsg.ops import batched_nms
from dsg.ops.nms import after_all

# a box never grows more than this in one step: exp(4.135) = 62.5 (R-CNN's bound, keeps exp from overflowing)
_MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:  # [..., 4] -> [...]
    """Areas in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(boxes: Tensor, others: Tensor) -> Tensor:  # [..., N, 4], [..., M, 4] -> [..., N, M]
    """Areas shared by each pair, square pixels."""
    top_left = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    bottom_right = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    sides = (bottom_right - top_left).clamp(min=0)  # [..., N, M, 2]
    return sides[..., 0] * sides[..., 1]


def iou(boxes: Tensor, others: Tensor) -> Tensor:  # [..., N, 4], [..., M, 4] -> [..., N, M]
    """Intersection over union of each pair in 0..1; 0 where both are empty."""
    shared = intersection(boxes, others)
    union = area(boxes)[..., :, None] + area(others)[..., None, :] - shared
    return torch.where(union > 0, shared / union.where(union > 0, torch.ones_like(union)), torch.zeros_like(shared))


def encode_deltas(boxes: Tensor, references: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Offsets that take references to boxes (R-CNN, appendix C), times weights.

    Args:
        boxes: Tensor[..., 4]; references: Tensor[..., 4] with positive sides.

    Returns:
        Tensor[..., 4]: (dx, dy, log dw, log dh), each in units of the reference's side.
    """
    sides = references[..., 2:] - references[..., :2]
    centres = references[..., :2] + 0.5 * sides
    wanted_sides = boxes[..., 2:] - boxes[..., :2]
    wanted_centres = boxes[..., :2] + 0.5 * wanted_sides
    scale = constant(weights, references)
    moves = scale[:2] * (wanted_centres - centres) / sides
    growths = scale[2:] * torch.log(wanted_sides / sides)
    return torch.cat([moves, growths], dim=-1)


def decode_deltas(deltas: Tensor, references: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """The boxes that offsets lead to: the inverse of `encode_deltas`, growth bounded.

    Args:
        deltas: Tensor[..., 4]; references: Tensor[..., 4].

    Returns:
        Tensor[..., 4].
    """
    sides = references[..., 2:] - references[..., :2]
    centres = references[..., :2] + 0.5 * sides
    scaled = deltas / constant(weights, deltas)
    new_centres = scaled[..., :2] * sides + centres
    new_halves = 0.5 * torch.exp(scaled[..., 2:].clamp(max=_MAX_LOG_SCALE)) * sides
    return torch.cat([new_centres - new_halves, new_centres + new_halves], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:  # [B, N, 4], int64 [B, 2] (height, width) -> [B, N, 4]
    """Boxes cut to their picture."""
    height, width = sizes.to(boxes.dtype).unbind(-1)  # [B] each
    bounds = torch.stack([width, height, width, height], dim=-1)[:, None]  # [B, 1, 4]
    return torch.minimum(boxes.clamp(min=0), bounds)


def has_sides(boxes: Tensor, least: float) -> Tensor:  # [..., 4] -> bool [...]
    """Which boxes have both sides of at least this many pixels; a NaN has none."""
    return ((boxes[..., 2] - boxes[..., 0]) >= least) & ((boxes[..., 3] - boxes[..., 1]) >= least)


def non_maximum_suppression(
    boxes: Tensor,  # [B, N, 4]
    scores: Tensor,  # [B, N]
    groups: Tensor,  # int64 [B, N]: boxes of different groups do not suppress each other
    valid: Tensor,  # bool [B, N]
    iou_threshold: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """The best `keep` boxes of each image after greedy suppression.

    Returns:
        index int64 [B, keep] into N, by falling score, and valid bool [B, keep]; index is 0 where not valid.
    """
    survives = batched_nms(boxes.detach(), scores, groups, valid, iou_threshold)  # [B, N]
    last = after_all(scores)
    kept_scores = scores.masked_fill(~survives, last)
    if scores.shape[1] < keep:
        kept_scores = functional.pad(kept_scores, (0, keep - scores.shape[1]), value=last)
    best, index = kept_scores.topk(keep, dim=1)  # [B, keep]
    alive = best > last
    return torch.where(alive, index, torch.zeros_like(index)), alive
