"""Which ground truth an anchor or RoI answers for, and which of them enter the loss.

"...": nothing for one image, B for a batch; N anchors or RoIs of an image, G ground-truth boxes, I ignore regions,
S sampled rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dsg.model.network.boxes import area, intersection, iou

POSITIVE, NEGATIVE, UNUSED = 1, 0, -1


def match(
    boxes: Tensor,  # [..., N, 4]
    truth: Tensor,  # [..., G, 4]
    truth_valid: Tensor,  # bool [..., G]
    ignore: Tensor,  # [..., I, 4]
    positive_iou: float,
    negative_iou: float,
    ignore_overlap: float,
    best_for_each_truth: bool,
) -> tuple[Tensor, Tensor]:
    """Assign by overlap (Faster R-CNN, section 3.1.2), for one image or for a batch of them.

    Positive from `positive_iou` on, negative below `negative_iou`, unused between. With `best_for_each_truth` the
    boxes that overlap a ground truth best are positive however small the overlap, unless it is zero. A negative with
    `ignore_overlap` of its area in an ignore region is unused: nobody knows what a crowd region holds.

    Returns:
        index int64 [..., N] of the ground truth overlapped most (0 if there is none), and
        role int64 [..., N]: POSITIVE, NEGATIVE or UNUSED.
    """
    if truth.shape[-2]:
        overlaps = iou(truth, boxes) * truth_valid[..., None]  # [..., G, N]
        best, index = overlaps.max(dim=-2)  # [..., N]
    else:
        best = boxes.new_zeros((*truth.shape[:-2], boxes.shape[-2]))
        index = best.to(torch.int64)
    role = torch.full_like(index, UNUSED).masked_fill(best < negative_iou, NEGATIVE)
    role = role.masked_fill(best >= positive_iou, POSITIVE)
    if best_for_each_truth and truth.shape[-2]:
        highest = overlaps.amax(dim=-1, keepdim=True)  # [..., G, 1]
        role = role.masked_fill(((overlaps == highest) & (highest > 0)).any(dim=-2), POSITIVE)
    if ignore.shape[-2]:
        inside = intersection(boxes, ignore) / area(boxes).clamp(min=1e-6)[..., None]  # [..., N, I]
        role = role.masked_fill((inside.amax(dim=-1) >= ignore_overlap) & (role == NEGATIVE), UNUSED)
    return index, role


class BalancedSampler:
    """A random choice with a bounded share of positives, topped up with negatives.

    Args:
        samples: S.
        positive_fraction: at most this share of S is positive, 0..1.
        draw: (shape, device) -> numbers by which rows are ordered, highest first; random unless a test says otherwise.
    """

    def __init__(
        self,
        samples: int,
        positive_fraction: float,
        draw: Callable[[tuple[int, ...], torch.device], Tensor] | None = None,
    ) -> None:
        self.samples = samples
        self.positives = int(samples * positive_fraction)
        self.draw = draw or (lambda shape, device: torch.rand(shape, device=device))

    def __call__(self, role: Tensor) -> tuple[Tensor, Tensor]:
        """Choose rows.

        Args:
            role: int64 [..., N] of POSITIVE, NEGATIVE, UNUSED; each image of a batch is drawn from by itself.

        Returns:
            index int64 [..., S] into N, positives first, and valid bool [..., S]: False where too few rows could be
            chosen, and from there on.
        """
        lots = self.draw(tuple(role.shape), role.device)  # [..., N]
        positive, is_positive = _highest(lots, role == POSITIVE, self.positives)
        negative, is_negative = _highest(lots, role == NEGATIVE, self.samples)
        room = self.samples - is_positive.sum(dim=-1, keepdim=True)
        is_negative = is_negative & (torch.arange(self.samples, device=role.device) < room)
        index = torch.cat([positive, negative], dim=-1)  # [..., positives + S]
        valid, place = torch.cat([is_positive, is_negative], dim=-1).sort(dim=-1, descending=True, stable=True)
        return index.gather(-1, place)[..., : self.samples], valid[..., : self.samples]


def _highest(lots: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` allowed rows with the highest lots: index [..., count] and whether there was one [..., count]."""
    missing = max(count - lots.shape[-1], 0)
    drawn = functional.pad(lots.masked_fill(~allowed, -torch.inf), (0, missing), value=-torch.inf)
    value, index = drawn.topk(count, dim=-1)
    return index.clamp(max=max(lots.shape[-1] - 1, 0)), value > -torch.inf
