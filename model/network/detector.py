"""What every network of this family does: pictures -> pyramid -> proposals -> what its heads make of them.

`MaskRCNN` (with the paper's switches: DSG) and the cascades say what the heads are.

B images, K proposals and D detections of an image, R RoIs of a batch in one list, C channels, m side of a mask.
Boxes are xyxy pixels of the resized picture.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dsg.model.network.anchors import AnchorGenerator
from dsg.model.network.batch import normalise, stack_images, stack_targets
from dsg.model.network.config import DetectorConfig
from dsg.model.network.detections import Detections
from dsg.model.network.losses import RPNLoss
from dsg.model.network.postprocess import KeptBoxes
from dsg.model.network.rpn import ProposalSelector, RPNHead
from dsg.model.network.types import PaddedDetections, ProposalMasks, Proposals, Targets
from dsg.model.network.whole import Whole

_ROWS = 256
Carried = TypeVar("Carried")
"""What a family's masks need of what its boxes were made of."""


class Detector(Whole, Generic[Carried]):
    """A region-based detector with masks, put together from its parts by `build`.

    A family defines `_roi_losses`, `_detect_boxes` and `_predict_masks`.

    Args:
        config: thresholds and switches; its sizes have gone into the parts.
        backbone: [B, 3, H, W] normalised -> five pyramid levels [B, C, H / 2^l, W / 2^l], l = 2..6.
        anchors, rpn_head, selector: from the pyramid to proposals.
        rpn_loss: used in training only.
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
        rpn_loss: RPNLoss,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.anchors = anchors
        self.rpn_head = rpn_head
        self.selector = selector
        self.rpn_loss = rpn_loss
        # float64, so that a network in float64 does not carry the rounding of float32
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float64), persistent=False)
        if config.mrpn:
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
            images: Tensor[3, H, W] each, RGB, float in 0..1 or all uint8, any mix of sizes; normalised and padded here,
                not resized.
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
            return self.detect(batch, sizes, score_threshold)
        if not batch.is_floating_point():
            raise TypeError("picture 0 must be a float tensor with RGB in 0..1 in training, got torch.uint8")
        if targets is None:
            raise ValueError("targets are needed in training mode; call eval() for detections")
        return self.losses(batch, sizes, stack_targets(targets, images, self.config.num_classes))

    def infer(self, batch: Tensor, sizes: Tensor) -> PaddedDetections:
        """Detections with static shapes; what exported files run.

        Args:
            batch: Tensor[B, 3, H, W], RGB in 0..1, sides multiples of 32.
            sizes: int64 Tensor[B, 2], the valid (height, width) of each picture.
        """
        kept, carried = self._kept_boxes(batch, sizes)
        labels, origin = kept.labels.flatten(), kept.origin.flatten()  # [B * D]
        probabilities, overlaps = self._predict_masks(as_rois(kept.boxes), labels, origin, carried)
        by_image = probabilities.unflatten(0, kept.labels.shape)  # [B, D, m, m]
        found = PaddedDetections(kept.valid, kept.boxes, kept.scores, kept.labels, by_image)
        return found if overlaps is None else _rescored(found, overlaps.unflatten(0, kept.labels.shape))

    def losses(self, batch: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Losses by name.

        Args:
            batch: Tensor[B, 3, H, W], RGB in 0..1; sizes: int64 [B, 2].
        """
        levels = self._pyramid(batch, sizes)
        anchors = self.anchors(levels, batch.shape[-2:], batch.dtype)
        objectness, offsets = self.rpn_head(levels)
        result = self.rpn_loss(objectness, offsets, anchors, targets)
        proposals = self.selector(objectness, offsets, anchors, sizes)
        return result | self._roi_losses(levels, proposals, sizes, targets)

    @abstractmethod
    def _roi_losses(
        self, levels: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Losses of the heads by name."""

    @abstractmethod
    def _detect_boxes(self, levels: list[Tensor], proposals: Proposals, sizes: Tensor) -> tuple[KeptBoxes, Carried]:
        """D detections an image, and what their masks will need."""

    @abstractmethod
    def _predict_masks(
        self,
        rois: Tensor,  # [R, 5], the detections' boxes
        labels: Tensor,  # int64 [R]
        origin: Tensor,  # int64 [R]: the row of B * K that each detection came from
        carried: Carried,
    ) -> tuple[Tensor, Tensor | None]:
        """Mask probabilities [R, m, m], and where the family foretells it their overlap with the truth [R] in 0..1."""

    def detect(self, batch: Tensor, sizes: Tensor, score_threshold: float) -> list[Detections]:
        """What `infer` finds, without its padding: masks are made of the rows that are returned alone."""
        kept, carried = self._kept_boxes(batch, sizes)
        wanted = kept.valid & (kept.scores >= score_threshold)  # [B, D]
        rows = wanted.flatten().nonzero().squeeze(1)  # [R]
        filled = rounded_up(rows)  # [Q], Q >= R
        rois = as_rois(kept.boxes)[filled]  # [Q, 5]
        labels = kept.labels.flatten()[filled]  # [Q]
        probabilities, overlaps = self._predict_masks(rois, labels, kept.origin.flatten()[filled], carried)
        rois, labels, probabilities = rois[: len(rows)], labels[: len(rows)], probabilities[: len(rows)]
        scores = kept.scores.flatten()[rows]  # [R]
        if overlaps is not None:
            scores = scores * overlaps[: len(rows)]
        found = _by_image(rois[:, 1:], scores, labels, probabilities, wanted, sizes)
        return found if overlaps is None else [_in_order(one, score_threshold) for one in found]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, but for the parts that stay float32 (see `whole`)."""
        return self.rpn_head.conv.weight.dtype

    def _pyramid(self, batch: Tensor, sizes: Tensor) -> list[Tensor]:
        if batch.is_floating_point():
            mean, std = self.pixel_mean.to(batch.dtype), self.pixel_std.to(batch.dtype)
        else:
            mean, std = self.pixel_mean, self.pixel_std
        levels: list[Tensor] = self.backbone(normalise(batch, sizes, mean, std, self.dtype))
        return levels

    def _kept_boxes(self, batch: Tensor, sizes: Tensor) -> tuple[KeptBoxes, Carried]:
        """Everything up to the masks."""
        levels = self._pyramid(batch, sizes)
        anchors = self.anchors(levels, batch.shape[-2:], levels[0].dtype)
        return self._detect_boxes(levels, self.selector(*self.rpn_head(levels), anchors, sizes), sizes)

    def _as_guide(self, logits: Tensor, features: Tensor) -> ProposalMasks:
        """Mask logits [R, m, m] and their F_- [R, C, P, P] as what guides the next head."""
        guidance = logits.sigmoid()
        if self.config.detach_guidance:
            guidance = guidance.detach()
        return ProposalMasks(logits, guidance * self.guidance_scale.to(guidance.dtype), features)


def rounded_up(rows: Tensor) -> Tensor:  # int64 [P] -> int64 [Q], Q the next multiple of `_ROWS`
    """Rows with the first one repeated at the end, on a GPU: cuDNN plans anew, in milliseconds, for each number of RoIs
    that it has not met."""
    missing = -len(rows) % _ROWS if rows.is_cuda and len(rows) else 0
    return torch.cat([rows, rows[:1].expand(missing)])


def as_rois(boxes: Tensor) -> Tensor:  # [B, K, 4] -> [B * K, 5]
    """Boxes of a batch in one list, each with the number of its picture in front."""
    images = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([images[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=-1).flatten(0, 1)


def without_padding(found: PaddedDetections, sizes: Tensor, score_threshold: float) -> list[Detections]:
    """Copies of the rows that are valid and score high enough, picture by picture; sizes int64 [B, 2]."""
    wanted = found.valid & (found.scores >= score_threshold)  # [B, D]
    rows = wanted.flatten().nonzero().squeeze(1)  # [R]
    parts = (found.boxes, found.scores, found.labels, found.mask_probs)
    boxes, scores, labels, probabilities = (part.flatten(0, 1)[rows] for part in parts)
    return _by_image(boxes, scores, labels, probabilities, wanted, sizes)


def _by_image(
    boxes: Tensor,  # [R, 4], rows of all pictures in turn
    scores: Tensor,  # [R]
    labels: Tensor,  # int64 [R]
    probabilities: Tensor,  # [R, m, m]
    wanted: Tensor,  # bool [B, D], R of them set
    sizes: Tensor,  # int64 [B, 2]
) -> list[Detections]:
    images = torch.cat([wanted.sum(dim=1, keepdim=True), sizes], dim=1).tolist()  # one way to the host for all numbers
    counts = [count for count, _, _ in images]
    parts = zip(
        boxes.split(counts), scores.split(counts), labels.split(counts), probabilities.split(counts), strict=True
    )
    return [
        Detections(own_boxes, own_scores, own_labels, own_masks, image_size=(height, width))
        for (own_boxes, own_scores, own_labels, own_masks), (_, height, width) in zip(parts, images, strict=True)
    ]


def _rescored(found: PaddedDetections, overlaps: Tensor) -> PaddedDetections:  # [B, D]
    """Scores times foretold overlaps, in falling order again; rows that are not valid stay last."""
    scores = found.scores * overlaps
    order = scores.where(found.valid, torch.full_like(scores, -1.0)).argsort(dim=1, descending=True, stable=True)
    row = torch.arange(order.shape[0], device=order.device)[:, None]  # [B, 1]
    return PaddedDetections(
        *(part[row, order] for part in (found.valid, found.boxes, scores, found.labels, found.mask_probs))
    )


def _in_order(found: Detections, score_threshold: float) -> Detections:
    order = found.scores.argsort(descending=True, stable=True)
    order = order[found.scores[order] >= score_threshold]
    return Detections(
        found.boxes[order], found.scores[order], found.labels[order], found.mask_probs[order], found.image_size
    )
