"""The network: Mask R-CNN, and with switches DSG (paper Fig. 2).

B images, K proposals or detections of an image, R RoIs of a batch in one list, C channels, m side of a mask.
Boxes are xyxy pixels of the resized picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsg.model.network.anchors import AnchorGenerator
from dsg.model.network.batch import normalise, stack_images, stack_targets
from dsg.model.network.config import DetectorConfig
from dsg.model.network.detections import Detections
from dsg.model.network.heads import BoxHead, Fusion, MaskHead
from dsg.model.network.losses import RoISampler, RPNLoss, box_head_loss, crop_masks, mask_loss, rows_with_mask
from dsg.model.network.postprocess import KeptBoxes, select_boxes
from dsg.model.network.rpn import ProposalSelector, RPNHead, widen
from dsg.model.network.types import PaddedDetections, ProposalMasks, Targets
from dsg.ops import MultiScaleSgRoIAlign

_ROWS = 256


class Detector(nn.Module):
    """A two-stage detector with masks, put together from its parts by `build`.

    Args:
        config: thresholds and the paper's switches; its sizes have gone into the parts.
        backbone: [B, 3, H, W] normalised -> five pyramid levels [B, C, H / 2^l, W / 2^l], l = 2..6.
        anchors, rpn_head, selector: from the pyramid to proposals.
        mpn: mask proposal network, one class-agnostic mask a proposal; None is Mask R-CNN.
        box_features, mask_features: RoI features of the two heads, shape-guided when given masks.
        box_head, mask_head: class logits and offsets; masks of each class.
        fuse_box, fuse_mask: bring the mask proposal network's features into the two heads.
        rpn_loss, roi_sampler: used in training only.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    guidance_scale: Tensor

    def __init__(
        self,
        *,
        config: DetectorConfig,
        backbone: nn.Module,
        anchors: AnchorGenerator,
        rpn_head: RPNHead,
        selector: ProposalSelector,
        mpn: MaskHead | None,
        box_features: MultiScaleSgRoIAlign,
        mask_features: MultiScaleSgRoIAlign,
        box_head: BoxHead,
        mask_head: MaskHead,
        fuse_box: Fusion | None,
        fuse_mask: Fusion | None,
        rpn_loss: RPNLoss,
        roi_sampler: RoISampler,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.anchors = anchors
        self.rpn_head = rpn_head
        self.selector = selector
        self.mpn = mpn
        self.box_features = box_features
        self.mask_features = mask_features
        self.box_head = box_head
        self.mask_head = mask_head
        self.fuse_box = fuse_box
        self.fuse_mask = fuse_mask
        self.rpn_loss = rpn_loss
        self.roi_sampler = roi_sampler
        # float64, so that a network in float64 does not carry the rounding of float32
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float64), persistent=False)
        if mpn is not None:
            # Guidance is multiplied by this, 1 unless the weights say otherwise: at 0 the maps guide nothing, and the
            # features are those of plain RoIAlign.
            self.register_buffer("guidance_scale", torch.ones(()))

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Any]] | None = None,
        score_threshold: float = 0.0,
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in eval mode.

        Args:
            images: float Tensor[3, H, W] each, RGB in 0..1, any mix of sizes; normalised and padded here, not resized.
            targets: in training, a dict a picture; see `stack_targets`.
            score_threshold: 0..1; detections below it are left out, and no time goes into their masks. The
                network's own floor holds in any case.

        Returns:
            In training mode the losses by name, scalars to be summed. In eval mode a `Detections` a picture, in that
            picture's pixels.

        Raises:
            TypeError, ValueError: pictures or targets that do not fit, named by their number.
        """
        batch, sizes = stack_images(images)
        if not self.training:
            return self._detect(batch, sizes, score_threshold)
        if targets is None:
            raise ValueError("targets are needed in training mode; call eval() for detections")
        return self.losses(batch, sizes, stack_targets(targets, images, self.config.num_classes))

    def infer(self, batch: Tensor, sizes: Tensor) -> PaddedDetections:
        """Detections with static shapes; what exported files run.

        Args:
            batch: Tensor[B, 3, H, W], RGB in 0..1, sides multiples of 32.
            sizes: int64 Tensor[B, 2], the valid (height, width) of each picture.
        """
        levels, kept, proposal_masks = self._kept_boxes(batch, sizes)
        labels, origin = kept.labels.flatten(), kept.origin.flatten()  # [B * D]
        masks = None if proposal_masks is None else proposal_masks.rows(origin)
        probabilities = self._mask_probs(levels, as_rois(kept.boxes), labels, masks)  # [B * D, m, m]
        by_image = probabilities.unflatten(0, kept.labels.shape)  # [B, D, m, m]
        return PaddedDetections(kept.valid, kept.boxes, kept.scores, kept.labels, by_image)

    def _detect(self, batch: Tensor, sizes: Tensor, score_threshold: float) -> list[Detections]:
        """What `infer` finds, without its padding: masks are made of the rows that are returned alone."""
        levels, kept, proposal_masks = self._kept_boxes(batch, sizes)
        wanted = kept.valid & (kept.scores >= score_threshold)  # [B, D]
        rows = wanted.flatten().nonzero().squeeze(1)  # [R]
        rois = as_rois(kept.boxes)[rows]  # [R, 5]
        labels = kept.labels.flatten()[rows]  # [R]
        masks = None if proposal_masks is None else proposal_masks.rows(kept.origin.flatten()[rows])
        counts = wanted.sum(dim=1).tolist()
        parts = zip(
            rois[:, 1:].split(counts),
            kept.scores.flatten()[rows].split(counts),
            labels.split(counts),
            self._mask_probs(levels, rois, labels, masks).split(counts),
            strict=True,
        )
        return [
            Detections(boxes, scores, own_labels, probabilities, image_size=(height, width))
            for (boxes, scores, own_labels, probabilities), (height, width) in zip(parts, sizes.tolist(), strict=True)
        ]

    def losses(self, batch: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Losses by name.

        Args:
            batch: Tensor[B, 3, H, W], RGB in 0..1; sizes: int64 [B, 2].
        """
        config = self.config
        levels = self._pyramid(batch, sizes)
        anchors = self.anchors(levels, batch.shape[-2:], batch.dtype)
        objectness, offsets = self.rpn_head(levels)
        result = self.rpn_loss(objectness, offsets, anchors, targets)
        samples = self.roi_sampler(self.selector(objectness, offsets, anchors, sizes), targets)

        # The mask proposal network runs on all sampled RoIs, since the box head needs what it gives; masks are learned
        # from the positives that have one.
        proposal_masks = self._proposal_masks(levels, samples.rois)
        logits, deltas = self._classify(levels, samples.rois, proposal_masks)
        result |= box_head_loss(logits, deltas, samples, targets, config.box_delta_weights, config.box_smooth_l1_beta)
        rows = rows_with_mask(samples, targets)  # [P]
        wanted = crop_masks(targets, samples, rows, 2 * config.mask_pool, config.roi_aligned)  # [P, m, m]
        if proposal_masks is not None:
            result["loss_proposal_mask"] = mask_loss(proposal_masks.logits[rows], wanted)
        filled = rounded_up(rows)  # [Q]
        row_masks = None if proposal_masks is None else proposal_masks.rows(filled)
        masks = self._segment(levels, samples.rois[filled], row_masks)  # [Q, num_classes + 1 or 1, m, m]
        channel = samples.labels[rows] if config.mask_per_class else torch.zeros_like(rows)
        result["loss_mask"] = mask_loss(masks[torch.arange(len(rows)), channel], wanted)
        return result

    def _pyramid(self, batch: Tensor, sizes: Tensor) -> list[Tensor]:
        mean, std = self.pixel_mean.to(batch.dtype), self.pixel_std.to(batch.dtype)
        levels: list[Tensor] = self.backbone(normalise(batch, sizes, mean, std))
        return levels

    def _kept_boxes(self, batch: Tensor, sizes: Tensor) -> tuple[list[Tensor], KeptBoxes, ProposalMasks | None]:
        """Everything up to the masks: the pyramid, D detections an image, the proposals' masks [B * K]."""
        levels = self._pyramid(batch, sizes)
        anchors = self.anchors(levels, batch.shape[-2:], batch.dtype)
        proposals = self.selector(*self.rpn_head(levels), anchors, sizes)
        rois = as_rois(proposals.boxes)  # [B * K, 5]
        proposal_masks = self._proposal_masks(levels, rois)
        logits, deltas = self._classify(levels, rois, proposal_masks)
        # A detection keeps the mask features of the proposal it came from: F_- follows it through NMS.
        return levels, select_boxes(logits, deltas, proposals, sizes, self.config), proposal_masks

    def _mask_probs(
        self, levels: list[Tensor], rois: Tensor, labels: Tensor, masks: ProposalMasks | None
    ) -> Tensor:  # [R, 5], int64 [R] -> [R, m, m] in 0..1
        wanted = labels if self.config.mask_per_class else None
        return widen(self._segment(levels, rois, masks, wanted)).sigmoid().squeeze(1)

    def _proposal_masks(self, levels: list[Tensor], rois: Tensor) -> ProposalMasks | None:
        if self.mpn is None:
            return None
        logits, features = self.mpn(self.mask_features(levels[:-1], rois))  # [R, 1, m, m], [R, C, P, P]
        guidance = logits[:, 0].sigmoid()
        if self.config.detach_guidance:
            guidance = guidance.detach()
        return ProposalMasks(logits[:, 0], guidance * self.guidance_scale.to(guidance.dtype), features)

    def _classify(self, levels: list[Tensor], rois: Tensor, masks: ProposalMasks | None) -> tuple[Tensor, Tensor]:
        guidance = masks.guidance if masks is not None and self.config.sgra_box else None
        features = self.box_features(levels[:-1], rois, guidance)  # [R, C, 7, 7]
        if masks is not None and self.fuse_box is not None:
            features = self.fuse_box(features, masks.features)
        logits, deltas = self.box_head(features)
        return logits, deltas

    def _segment(
        self, levels: list[Tensor], rois: Tensor, masks: ProposalMasks | None, labels: Tensor | None = None
    ) -> Tensor:
        guidance = masks.guidance if masks is not None and self.config.sgra_mask else None
        features = self.mask_features(levels[:-1], rois, guidance)  # [R, C, 14, 14]
        if masks is not None and self.fuse_mask is not None:
            features = self.fuse_mask(features, masks.features)
        logits, _ = self.mask_head(features, labels)
        return logits


def rounded_up(rows: Tensor) -> Tensor:  # int64 [P] -> int64 [Q], Q the next multiple of `_ROWS`
    """Rows with the first one repeated at the end, on a GPU: cuDNN plans anew, in milliseconds, for each number of RoIs
    that it has not met."""
    missing = -len(rows) % _ROWS if rows.is_cuda and len(rows) else 0
    return torch.cat([rows, rows[:1].expand(missing)])


def as_rois(boxes: Tensor) -> Tensor:  # [B, K, 4] -> [B * K, 5]
    """Boxes of a batch in one list, each with the number of its picture in front."""
    images = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([images[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=-1).flatten(0, 1)
