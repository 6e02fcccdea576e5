"""Losses: what the network's raw outputs are held against. Apart from the network, which never sees ground truth.

B images, N anchors of an image, R sampled RoIs of a batch, m side of a mask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.boxes import encode_deltas
from dsg.model.network.matching import POSITIVE, UNUSED, BalancedSampler, match
from dsg.model.network.rpn import DELTA_WEIGHTS, widen
from dsg.model.network.types import Proposals, Targets
from dsg.ops import sg_roi_align

# Pairs of an anchor and a ground-truth box that are compared at once: about 40 bytes each while it lasts.
_MOST_PAIRS = 2**25


class RPNLoss(nn.Module):
    """Objectness and box offsets of sampled anchors (Faster R-CNN, section 3.1.2).

    Args:
        positive_iou, negative_iou: assignment thresholds.
        ignore_overlap: share of an anchor inside a crowd region from which it is no negative.
        beta: where smooth L1 turns from square to straight.
        sampler: chooses the anchors of an image.
    """

    def __init__(
        self,
        positive_iou: float,
        negative_iou: float,
        ignore_overlap: float,
        beta: float,
        sampler: BalancedSampler,
    ) -> None:
        super().__init__()
        self.positive_iou = positive_iou
        self.negative_iou = negative_iou
        self.ignore_overlap = ignore_overlap
        self.beta = beta
        self.sampler = sampler

    def forward(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        """Mean over all sampled anchors of the batch.

        Args:
            logits: Tensor[B, N_l] a level; deltas: Tensor[B, N_l, 4] a level; anchors: Tensor[N_l, 4] a level.

        Returns:
            `loss_objectness`, `loss_rpn_box_reg`.
        """
        all_logits, all_deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)  # [B, N], [B, N, 4]
        all_anchors = torch.cat(anchors)  # [N, 4]
        objectness, box, samples = all_logits.sum() * 0, all_deltas.sum() * 0, all_logits.new_zeros(())
        for part in _parts(targets.boxes.shape, len(all_anchors)):
            truth = targets.boxes[part]  # [b, G, 4]
            index, role = match(
                all_anchors, truth, targets.valid[part], targets.ignore_boxes[part],
                self.positive_iou, self.negative_iou, self.ignore_overlap, best_for_each_truth=True,
            )  # fmt: skip
            rows, valid = self.sampler(role)  # [b, S]
            is_positive = valid & (role.gather(1, rows) == POSITIVE)
            found = all_logits[part].gather(1, rows)
            wrong = functional.binary_cross_entropy_with_logits(found, is_positive.to(found.dtype), reduction="none")
            objectness = objectness + wrong.where(valid, 0).sum()
            samples = samples + valid.sum()

            image, place = is_positive.nonzero(as_tuple=True)  # [P] each
            positive = rows[image, place]
            wanted = encode_deltas(truth[image, index[image, positive]], all_anchors[positive], DELTA_WEIGHTS)
            off = all_deltas[part][image, positive]  # [P, 4]
            box = box + functional.smooth_l1_loss(off, wanted, beta=self.beta, reduction="sum")
        samples = samples.clamp(min=1)
        return {"loss_objectness": objectness / samples, "loss_rpn_box_reg": box / samples}


@dataclass(frozen=True)
class RoISamples:
    """RoIs of a batch that enter the heads' losses, in one list."""

    rois: Tensor  # [R, 5] (image, x1, y1, x2, y2)
    truth: Tensor  # int64 [R]: which ground-truth box of its image each was matched to
    labels: Tensor  # int64 [R], 0 for background

    @property
    def images(self) -> Tensor:  # int64 [R]
        """Number of the picture of each."""
        return self.rois[:, 0].to(torch.int64)


class RoISampler(nn.Module):
    """Chooses RoIs for the heads from the proposals and the ground truth itself.

    Args:
        positive_iou: positive from here on, negative below.
        ignore_overlap: share of a RoI inside a crowd region from which it is no negative.
        sampler: chooses the RoIs of an image.
    """

    def __init__(self, positive_iou: float, ignore_overlap: float, sampler: BalancedSampler) -> None:
        super().__init__()
        self.positive_iou = positive_iou
        self.ignore_overlap = ignore_overlap
        self.sampler = sampler

    @torch.no_grad()
    def forward(self, proposals: Proposals, targets: Targets) -> RoISamples:
        """RoIs, image by image, positives first within an image."""
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)  # [B, K + G, 4]
        usable = torch.cat([proposals.valid, targets.valid], dim=1)
        index, role = match(
            boxes, targets.boxes, targets.valid, targets.ignore_boxes,
            self.positive_iou, self.positive_iou, self.ignore_overlap, best_for_each_truth=False,
        )  # fmt: skip
        rows, valid = self.sampler(role.masked_fill(~usable, UNUSED))  # [B, S]
        image, place = valid.nonzero(as_tuple=True)  # [R] each
        row = rows[image, place]
        truth = index[image, row]
        labels = torch.zeros_like(truth)
        if targets.labels.shape[1]:
            labels = targets.labels[image, truth].where(role[image, row] == POSITIVE, 0)
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes[image, row]], dim=1)  # [R, 5]
        return RoISamples(rois, truth, labels)


def _parts(truth: torch.Size, anchors: int) -> list[slice]:
    """Images whose overlaps with the anchors are worked out at once; their number depends on shapes alone."""
    batch, boxes = truth[0], truth[1]
    at_once = max(1, _MOST_PAIRS // max(boxes * anchors, 1))
    return [slice(first, first + at_once) for first in range(0, batch, at_once)]


def box_head_loss(
    logits: Tensor,  # [R, num_classes + 1]
    deltas: Tensor,  # [R, num_classes + 1, 4]
    samples: RoISamples,
    targets: Targets,
    delta_weights: tuple[float, float, float, float],
    beta: float,
) -> dict[str, Tensor]:
    """Cross entropy over all RoIs, smooth L1 of the true class's offsets over the positives divided by all RoIs.

    Returns:
        `loss_classifier`, `loss_box_reg`.
    """
    logits, deltas = widen(logits), widen(deltas)
    count = max(len(logits), 1)
    positive = samples.labels.nonzero().squeeze(1)  # [P]
    truth = targets.boxes[samples.images[positive], samples.truth[positive]]  # [P, 4]
    wanted = encode_deltas(truth, samples.rois[positive, 1:], delta_weights)
    found = deltas[positive, samples.labels[positive]]  # [P, 4]
    return {
        "loss_classifier": functional.cross_entropy(logits, samples.labels, reduction="sum") / count,
        "loss_box_reg": functional.smooth_l1_loss(found, wanted, beta=beta, reduction="sum") / count,
    }


def rows_with_mask(samples: RoISamples, targets: Targets) -> Tensor:  # -> int64 [P] into the samples
    """RoIs that masks are learned from: positives whose ground truth has a mask."""
    positive = samples.labels > 0
    if targets.has_mask.shape[1]:
        positive = positive & targets.has_mask[samples.images, samples.truth]
    return positive.nonzero().squeeze(1)


def mask_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross entropy per pixel, mean over RoIs and pixels; a zero with a gradient when there is no RoI.

    Args:
        logits: Tensor[R, m, m]; wanted: Tensor[R, m, m] in 0..1.
    """
    total = functional.binary_cross_entropy_with_logits(widen(logits), wanted, reduction="sum")
    return total / max(wanted.numel(), 1)


@torch.no_grad()
def crop_masks(targets: Targets, samples: RoISamples, rows: Tensor, side: int, aligned: bool) -> Tensor:
    """What the mask of each RoI should be: the matched instance's mask, averaged into side x side cells of the RoI.

    Args:
        rows: int64 [R] into the samples; each must be matched to a ground truth with a mask.
        side: m, cells.
        aligned: half-pixel coordinates, as the RoI features have them.

    Returns:
        Tensor[R, side, side] in 0..1.
    """
    crops = samples.rois.new_zeros((len(rows), side, side))
    images, truth, boxes = samples.images[rows], samples.truth[rows], samples.rois[rows, 1:]
    # Images of one size, all of them as a rule, put their masks in one list.
    for size in {masks.shape[1:] for masks in targets.masks}:
        lists = [masks if masks.shape[1:] == size else masks[:0] for masks in targets.masks]
        counts = torch.tensor([len(masks) for masks in lists])  # [B]
        start = (counts.cumsum(0) - counts).where(counts > 0, -1).to(rows.device)  # [B]
        mine = (start[images] >= 0).nonzero().squeeze(1)  # [P]
        if not len(mine):
            continue
        # Only masks that are asked for become numbers.
        instances, place = (start[images] + truth)[mine].unique(return_inverse=True)
        pixels = torch.cat([masks for masks in lists if len(masks)])[instances, None].to(crops.dtype)  # [n, 1, H, W]
        rois = torch.cat([place[:, None].to(crops.dtype), boxes[mine]], dim=1)  # [P, 5]
        crops[mine] = sg_roi_align(pixels, rois, None, side, 1.0, sampling_ratio=0, aligned=aligned)[:, 0]
    return crops
