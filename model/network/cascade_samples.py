"""RoIs of a cascade in training: moved from stage to stage, and told anew what they answer for.

B images, R sampled RoIs of a batch in one list, S rows of an image, G padded ground-truth boxes.
"""

import torch
from torch import Tensor

from dsg.model.network.boxes import area, clip_boxes, decode_deltas, intersection, iou
from dsg.model.network.config import FourNumbers
from dsg.model.network.losses import RoISamples
from dsg.model.network.types import Proposals, Targets


@torch.no_grad()
def refine(rois: Tensor, deltas: Tensor, weights: FourNumbers, sizes: Tensor) -> Tensor:
    """RoIs moved by a stage's offsets and cut to their pictures; no gradient goes through coordinates.

    Args:
        rois: Tensor[R, 5]; deltas: Tensor[R, 1, 4]; sizes: int64 Tensor[B, 2] (height, width).

    Returns:
        Tensor[R, 5].
    """
    images = rois[:, 0].to(torch.int64)
    moved = decode_deltas(deltas[:, 0].to(rois.dtype), rois[:, 1:], weights)  # [R, 4]
    clipped = clip_boxes(moved[:, None], sizes[images])[:, 0]
    return torch.cat([rois[:, :1], clipped], dim=1)


def is_truth(samples: RoISamples, targets: Targets) -> Tensor:  # -> bool [R]
    """RoIs that are ground-truth boxes themselves: samplers add these to the proposals."""
    if not targets.boxes.shape[1]:
        return torch.zeros_like(samples.labels, dtype=torch.bool)
    same = samples.rois[:, 1:] == targets.boxes[samples.images, samples.truth]  # [R, 4]
    return same.all(dim=1) & (samples.labels > 0)


@torch.no_grad()
def assign(rois: Tensor, targets: Targets, positive_iou: float, ignore_overlap: float) -> tuple[RoISamples, Tensor]:
    """What each RoI answers for, without choosing among them.

    Args:
        rois: Tensor[R, 5].
        positive_iou: positive from here on, negative below.
        ignore_overlap: share of a RoI inside a crowd region from which it is no negative.

    Returns:
        samples of the same rows, and bool [R]: False for those that no loss may use.
    """
    images, boxes = rois[:, 0].to(torch.int64), rois[:, 1:]
    labels = torch.zeros_like(images)
    truth = torch.zeros_like(images)
    usable = torch.ones_like(images, dtype=torch.bool)
    if targets.boxes.shape[1]:
        overlaps = iou(boxes[:, None], targets.boxes[images])[:, 0] * targets.valid[images]  # [R, G]
        best, truth = overlaps.max(dim=1)
        labels = targets.labels[images, truth].where(best >= positive_iou, 0)
    if targets.ignore_boxes.shape[1]:
        inside = intersection(boxes[:, None], targets.ignore_boxes[images])[:, 0]  # [R, I]
        share = inside / area(boxes).clamp(min=1e-6)[:, None]
        usable = (share.amax(dim=1) < ignore_overlap) | (labels > 0)
    return RoISamples(rois, truth, labels), usable


def select(samples: RoISamples, rows: Tensor) -> RoISamples:
    """Those rows (bool [R] or int64 [Q]) alone."""
    return RoISamples(samples.rois[rows], samples.truth[rows], samples.labels[rows])


def as_proposals(rois: Tensor, keep: Tensor, batch: int) -> Proposals:
    """RoIs in one list as padded proposals of each image; the order within an image stays.

    Args:
        rois: Tensor[R, 5]; keep: bool [R]: others are left out; batch: B.
    """
    rois = rois[keep]
    images = rois[:, 0].to(torch.int64)
    order = images.argsort(stable=True)
    images, boxes = images[order], rois[order, 1:]
    counts = torch.bincount(images, minlength=batch)  # [B]
    place = torch.arange(len(images), device=rois.device) - (counts.cumsum(0) - counts)[images]
    rows = max(int(counts.max()), 1)  # S
    padded = boxes.new_zeros((batch, rows, 4))
    padded[images, place] = boxes
    valid = torch.arange(rows, device=rois.device) < counts[:, None]  # [B, S]
    return Proposals(padded, valid.to(boxes.dtype), valid)
