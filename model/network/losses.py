"""Losses: what the network's raw outputs are held against. Apart from the network, which never sees ground truth.

B images, N anchors of an image, R sampled RoIs of a batch, m side of a mask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.boxes import encode_deltas
from dsg.model.network.matching import POSITIVE, BalancedSampler, match
from dsg.model.network.rpn import DELTA_WEIGHTS, widen
from dsg.model.network.types import Proposals, Targets
from dsg.ops import sg_roi_align


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
        for image in range(len(all_logits)):
            index, role = match(
                all_anchors, targets.boxes[image], targets.valid[image], targets.ignore_boxes[image],
                self.positive_iou, self.negative_iou, self.ignore_overlap, best_for_each_truth=True,
            )  # fmt: skip
            rows, valid = self.sampler(role)  # [S]
            rows = rows[valid]
            is_positive = role[rows] == POSITIVE
            objectness = objectness + functional.binary_cross_entropy_with_logits(
                all_logits[image, rows], is_positive.to(all_logits.dtype), reduction="sum"
            )
            positive = rows[is_positive]
            wanted = encode_deltas(targets.boxes[image, index[positive]], all_anchors[positive], DELTA_WEIGHTS)
            box = box + functional.smooth_l1_loss(all_deltas[image, positive], wanted, beta=self.beta, reduction="sum")
            samples = samples + len(rows)
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
        rois, truth, labels = [], [], []
        for image in range(len(proposals.boxes)):
            boxes = torch.cat([proposals.boxes[image], targets.boxes[image]])  # [K + G, 4]
            usable = torch.cat([proposals.valid[image], targets.valid[image]])
            index, role = match(
                boxes, targets.boxes[image], targets.valid[image], targets.ignore_boxes[image],
                self.positive_iou, self.positive_iou, self.ignore_overlap, best_for_each_truth=False,
            )  # fmt: skip
            rows, valid = self.sampler(role.masked_fill(~usable, -1))
            rows = rows[valid]
            matched = index[rows]
            is_positive = role[rows] == POSITIVE
            rois.append(functional.pad(boxes[rows], (1, 0), value=float(image)))  # [S, 5]
            truth.append(matched)
            labels.append(
                targets.labels[image, matched].where(is_positive, 0)
                if targets.labels.shape[1]
                else torch.zeros_like(matched)
            )
        return RoISamples(torch.cat(rois), torch.cat(truth), torch.cat(labels))


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
    images = samples.images[rows]
    crops = samples.rois.new_zeros((len(rows), side, side))
    for image, masks in enumerate(targets.masks):
        mine = (images == image).nonzero().squeeze(1)  # [P]
        if not len(mine):
            continue
        instances, place = samples.truth[rows[mine]].unique(return_inverse=True)
        pixels = masks[instances, None].to(crops.dtype)  # [n, 1, H, W]
        rois = torch.cat([place[:, None].to(crops.dtype), samples.rois[rows[mine], 1:]], dim=1)  # [P, 5]
        crops[mine] = sg_roi_align(pixels, rois, None, side, 1.0, sampling_ratio=0, aligned=aligned)[:, 0]
    return crops
