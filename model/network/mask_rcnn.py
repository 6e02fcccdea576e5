"""Mask R-CNN, and with switches DSG (paper Fig. 2), Mask Scoring R-CNN and PANet: one stage of heads.

B images, K proposals of an image, R RoIs of a batch in one list, P of them with a mask to learn, C channels, m side of
a mask.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsg.model.network.detector import Detector, as_rois, rounded_up
from dsg.model.network.heads import Fusion, MaskHead
from dsg.model.network.losses import RoISampler, box_head_loss, crop_masks, mask_loss, rows_with_mask
from dsg.model.network.mask_iou import MaskIoUHead, mask_iou_loss
from dsg.model.network.postprocess import KeptBoxes, select_boxes
from dsg.model.network.rpn import widen
from dsg.model.network.types import ProposalMasks, Proposals, Targets


class MaskRCNN(Detector[list[Tensor]]):
    """One box head and one mask head on the proposals, put together from its parts by `build`.

    Args:
        mpn: mask proposal network, one class-agnostic mask a proposal; None is Mask R-CNN.
        box_features, mask_features: (levels, rois, guidance or None) -> RoI features of the two heads.
        box_head: [R, C, 7, 7] -> class logits [R, num_classes + 1] and offsets [R, num_classes + 1, 4].
        mask_head: masks of each class.
        fuse_box, fuse_mask: bring the mask proposal network's features into the two heads.
        mask_iou: foretells the overlap of masks with the truth; None: scores are the box head's.
        roi_sampler: used in training only.
        parts: what `Detector` takes.
    """

    def __init__(
        self,
        *,
        mpn: MaskHead | None,
        box_features: nn.Module,
        mask_features: nn.Module,
        box_head: nn.Module,
        mask_head: MaskHead,
        fuse_box: Fusion | None,
        fuse_mask: Fusion | None,
        mask_iou: MaskIoUHead | None,
        roi_sampler: RoISampler,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.mpn = mpn
        self.box_features = box_features
        self.mask_features = mask_features
        self.box_head = box_head
        self.mask_head = mask_head
        self.fuse_box = fuse_box
        self.fuse_mask = fuse_mask
        self.mask_iou = mask_iou
        self.roi_sampler = roi_sampler

    def _roi_losses(
        self, levels: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        config = self.config
        samples = self.roi_sampler(proposals, targets)
        # The mask proposal network runs on all sampled RoIs, since the box head needs what it gives; masks are learned
        # from the positives that have one.
        masks = self._proposal_masks(levels, samples.rois)
        logits, deltas = self._classify(levels, samples.rois, masks)
        result = box_head_loss(logits, deltas, samples, targets, config.box_delta_weights, config.box_smooth_l1_beta)
        rows = rows_with_mask(samples, targets)  # [P]
        wanted = crop_masks(targets, samples, rows, 2 * config.mask_pool, config.roi_aligned)  # [P, m, m]
        if masks is not None:
            result["loss_proposal_mask"] = mask_loss(masks.logits[rows], wanted)
        filled = rounded_up(rows)  # [Q], Q >= P
        row_masks = None if masks is None else masks.rows(filled)
        features = self._mask_inputs(levels, samples.rois[filled], row_masks)  # [Q, C, 14, 14]
        mask_logits, _ = self.mask_head(features)  # [Q, num_classes + 1 or 1, m, m]
        labels = samples.labels[rows]
        chosen = mask_logits[torch.arange(len(rows)), self.mask_head.channels(labels)]  # [P, m, m]
        result["loss_mask"] = mask_loss(chosen, wanted)
        if self.mask_iou is not None:
            foretold = self.mask_iou(features[: len(rows)], chosen, labels)  # [P]
            result["loss_mask_iou"] = mask_iou_loss(foretold, chosen, wanted, samples, rows, targets)
        return result

    def _detect_boxes(
        self, levels: list[Tensor], proposals: Proposals, sizes: Tensor
    ) -> tuple[KeptBoxes, list[Tensor]]:
        rois = as_rois(proposals.boxes)  # [B * K, 5]
        logits, deltas = self._classify(levels, rois, self._proposal_masks(levels, rois))
        return select_boxes(logits, deltas, proposals, sizes, self.config), levels

    def _predict_masks(
        self, rois: Tensor, labels: Tensor, origin: Tensor, carried: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        features = self._detection_features(carried, rois)  # [R, C, 14, 14]
        logits = self.mask_head(features, labels)[0].squeeze(1)  # [R, m, m]
        overlaps = None if self.mask_iou is None else widen(self.mask_iou(features, logits, labels)).clamp(0, 1)
        return widen(logits).sigmoid(), overlaps

    def _detection_features(self, levels: list[Tensor], rois: Tensor) -> Tensor:  # [R, 5] -> [R, C, 14, 14]
        """What the mask head reads of detections.

        F_- is made anew of the detections' own boxes. That of the proposals they came from is of other boxes, while in
        training both heads look at the same one: on crowded nuclei it costs 0.8 points of mask AP.
        """
        if self.mpn is None or self.fuse_mask is None or self.config.sgra_mask:
            masks = self._proposal_masks(levels, rois) if self.config.sgra_mask else None
            return self._mask_inputs(levels, rois, masks)
        features: Tensor = self.mask_features(levels[:-1], rois)
        return self.fuse_mask(features, self.mpn.hidden(features))  # its masks guide nothing here

    def _proposal_masks(self, levels: list[Tensor], rois: Tensor) -> ProposalMasks | None:
        if self.mpn is None:
            return None
        logits, features = self.mpn(self.mask_features(levels[:-1], rois))  # [R, 1, m, m], [R, C, P, P]
        return self._as_guide(logits[:, 0], features)

    def _classify(self, levels: list[Tensor], rois: Tensor, masks: ProposalMasks | None) -> tuple[Tensor, Tensor]:
        guidance = masks.guidance if masks is not None and self.config.sgra_box else None
        features = self.box_features(levels[:-1], rois, guidance)  # [R, C, 7, 7]
        if masks is not None and self.fuse_box is not None:
            features = self.fuse_box(features, masks.features)
        logits, deltas = self.box_head(features)
        return logits, deltas

    def _mask_inputs(self, levels: list[Tensor], rois: Tensor, masks: ProposalMasks | None) -> Tensor:
        guidance = masks.guidance if masks is not None and self.config.sgra_mask else None
        features: Tensor = self.mask_features(levels[:-1], rois, guidance)  # [R, C, 14, 14]
        if masks is not None and self.fuse_mask is not None:
            features = self.fuse_mask(features, masks.features)
        return features
