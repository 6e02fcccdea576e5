"""Which ground truth an anchor or RoI answers for, and which of them enter the loss.

N anchors or RoIs of an image, G ground-truth boxes, I ignore regions, S sampled rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsg.model.network.boxes import area, intersection, iou

POSITIVE, NEGATIVE, UNUSED = 1, 0, -1


def match(
    boxes: Tensor,  # [N, 4]
    truth: Tensor,  # [G, 4]
    truth_valid: Tensor,  # bool [G]
    ignore: Tensor,  # [I, 4]
    positive_iou: float,
    negative_iou: float,
    ignore_overlap: float,
    best_for_each_truth: bool,
) -> tuple[Tensor, Tensor]:
    """Assign by overlap (Faster R-CNN, section 3.1.2).

    Positive from `positive_iou` on, negative below `negative_iou`, unused between. With `best_for_each_truth` the
    boxes that overlap a ground truth best are positive however small the overlap, unless it is zero. A negative with
    `ignore_overlap` of its area in an ignore region is unused: nobody knows what a crowd region holds.

    Returns:
        index int64 [N] of the ground truth overlapped most (0 if there is none), and
        role int64 [N]: POSITIVE, NEGATIVE or UNUSED.
    """
    if truth.shape[0]:
        overlaps = iou(truth, boxes) * truth_valid[:, None]  # [G, N]
        best, index = overlaps.max(dim=0)  # [N]
    else:
        best, index = (
            boxes.new_zeros(len(boxes)),
            torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device),
        )
    role = torch.full_like(index, UNUSED)
    role[best < negative_iou] = NEGATIVE
    role[best >= positive_iou] = POSITIVE
    if best_for_each_truth and truth.shape[0]:
        highest = overlaps.amax(dim=1, keepdim=True)  # [G, 1]
        role[((overlaps == highest) & (highest > 0)).any(dim=0)] = POSITIVE
    if ignore.shape[0]:
        inside = intersection(boxes, ignore) / area(boxes).clamp(min=1e-6)[:, None]  # [N, I]
        role[(inside.amax(dim=1) >= ignore_overlap) & (role == NEGATIVE)] = UNUSED
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
            role: int64 [N] of POSITIVE, NEGATIVE, UNUSED.

        Returns:
            index int64 [S] into N, positives first, and valid bool [S]: False where too few rows could be chosen.
        """
        order = self.draw(role.shape, role.device).argsort(descending=True)  # [N]
        shuffled = role[order]
        is_positive, is_negative = shuffled == POSITIVE, shuffled == NEGATIVE
        positive = is_positive & (is_positive.cumsum(0) <= self.positives)
        room = self.samples - positive.sum()
        negative = is_negative & (is_negative.cumsum(0) <= room)
        rank = positive.to(torch.int64) * 2 + negative  # 2 positive, 1 negative, 0 left out
        rank = torch.nn.functional.pad(rank, (0, max(self.samples - len(rank), 0)))
        chosen, place = rank.sort(descending=True, stable=True)
        place = place[: self.samples].clamp(max=max(len(order) - 1, 0))
        return order[place], chosen[: self.samples] > 0
