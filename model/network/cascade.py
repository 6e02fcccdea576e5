"""Cascade Mask R-CNN (arXiv 1906.09756) and Hybrid Task Cascade (arXiv 1901.07518): stages of the parts of Mask R-CNN.

B images, K proposals of an image, R RoIs of a batch in one list, P of them with a mask to learn, C channels, m side of
a mask, T stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.cascade_samples import as_proposals, is_truth, refine
from dsg.model.network.detector import Detector, as_rois, rounded_up
from dsg.model.network.heads import BoxHead, Fusion, MaskHead
from dsg.model.network.losses import (
    RoISampler,
    RoISamples,
    box_head_loss,
    crop_masks,
    mask_loss,
    rows_with_mask,
)
from dsg.model.network.postprocess import KeptBoxes, select_boxes
from dsg.model.network.rpn import widen
from dsg.model.network.semantic import SemanticBranch, map_of_data, map_of_instances, semantic_loss
from dsg.model.network.types import ProposalMasks, Proposals, Targets


class CascadeStage(nn.Module):
    """The heads of one stage.

    Args:
        box_head: class logits and class-agnostic offsets.
        mask_head: None where the stage predicts no mask.
        fuse_box, fuse_mask: bring the features of the mask head before into the two heads.
    """

    def __init__(
        self, box_head: BoxHead, mask_head: MaskHead | None, fuse_box: Fusion | None, fuse_mask: Fusion | None
    ) -> None:
        super().__init__()
        self.box_head = box_head
        self.mask_head = mask_head
        self.fuse_box = fuse_box
        self.fuse_mask = fuse_mask


@dataclass(frozen=True)
class Scene:
    """What RoI features of one batch are taken from, and which masks guide by now."""

    levels: list[Tensor]  # [B, C, Hf, Wf] each, P2 to P5
    semantic: Tensor | None  # [B, C, h, w]
    masks: ProposalMasks | None = None  # of all RoIs at hand


class CascadeDetector(Detector[Scene]):
    """Stages one after another, each on the boxes of the one before; put together from its parts by `build`.

    Args:
        mpn: mask proposal network of stage 0; None without guidance.
        box_features, mask_features: (levels, rois, guidance or None) -> RoI features of the two kinds of heads.
        stages: T of them.
        semantic: adds its features to those of every RoI; None: off.
        roi_samplers: one a stage, with the stage's threshold; used in training only.
        parts: what `Detector` takes.
    """

    def __init__(
        self,
        *,
        mpn: MaskHead | None,
        box_features: nn.Module,
        mask_features: nn.Module,
        stages: Sequence[CascadeStage],
        semantic: SemanticBranch | None,
        roi_samplers: Sequence[RoISampler],
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.mpn = mpn
        self.box_features = box_features
        self.mask_features = mask_features
        self.stages = nn.ModuleList(stages)
        self.semantic = semantic
        self.roi_samplers = nn.ModuleList(roi_samplers)

    def _roi_losses(
        self, levels: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Each stage samples anew: from the proposals, then from what the stage before made of its samples."""
        scene, result = self._scene_and_loss(levels, sizes, targets)
        for number, sampler in enumerate(self.roi_samplers):
            samples = sampler(proposals, targets)
            logits, deltas = self._classify(number, samples.rois, scene)
            result |= self._box_losses(number, logits, deltas, samples, targets)
            refined = refine(samples.rois, deltas, self.config.stage_delta_weights[number], sizes)
            proposals = as_proposals(refined, ~is_truth(samples, targets), len(sizes))
            mask_samples = sampler(proposals, targets) if self.config.interleaved else samples
            result |= self._mask_losses(number, mask_samples, scene, targets)
        return result

    def _mask_losses(self, number: int, samples: RoISamples, scene: Scene, targets: Targets) -> dict[str, Tensor]:
        """Of one stage. The features that HTC takes from the mask heads before are made of the same RoIs."""
        stage = self._stage(number)
        if stage.mask_head is None:
            return {}
        rows = rows_with_mask(samples, targets)  # [P]
        features = self._mask_inputs(samples.rois[rounded_up(rows)], scene)  # [Q, C, 14, 14], Q >= P
        hidden: Tensor | None = None
        for before in map(self._stage, range(number)):
            if stage.fuse_mask is not None and before.mask_head is not None:
                hidden = before.mask_head.hidden(fused(before.fuse_mask, features, hidden))
        logits, _ = stage.mask_head(fused(stage.fuse_mask, features, hidden))  # [Q, outputs, m, m]
        chosen = logits[torch.arange(len(rows)), stage.mask_head.channels(samples.labels[rows])]  # [P, m, m]
        wanted = crop_masks(targets, samples, rows, 2 * self.config.mask_pool, self.config.roi_aligned)
        return self._weighted_mask_loss(number, mask_loss(chosen, wanted))

    def _box_losses(
        self, number: int, logits: Tensor, deltas: Tensor, samples: RoISamples, targets: Targets
    ) -> dict[str, Tensor]:
        config = self.config
        losses = box_head_loss(
            logits,
            deltas.expand(-1, logits.shape[1], -1),  # the same for every class
            samples,
            targets,
            config.stage_delta_weights[number],
            config.box_smooth_l1_beta,
        )
        return {
            f"loss_classifier_{number + 1}": config.stage_class_loss_weights[number] * losses["loss_classifier"],
            f"loss_box_reg_{number + 1}": config.stage_box_loss_weights[number] * losses["loss_box_reg"],
        }

    def _weighted_mask_loss(self, number: int, loss: Tensor) -> dict[str, Tensor]:
        return {f"loss_mask_{number + 1}": self.config.stage_mask_loss_weights[number] * loss}

    def _detect_boxes(self, levels: list[Tensor], proposals: Proposals, sizes: Tensor) -> tuple[KeptBoxes, Scene]:
        """All stages on all proposals; scores are averaged, boxes are those of the last."""
        config = self.config
        scene, _ = self._scene(levels)
        rois = as_rois(proposals.boxes)  # [B * K, 5]
        scene = self._first_guides(scene, rois)
        scores = []
        for number, weights in enumerate(config.stage_delta_weights):
            logits, deltas = self._classify(number, rois, scene)
            scores.append(widen(logits))
            rois = refine(rois, deltas, weights, sizes)
            if number + 1 < len(self.stages):
                scene = self._next_guides(number, rois, logits, scene)
        averaged = _average(scores[-config.score_stages :], config.average_probabilities)  # [B * K, classes + 1]
        boxes = rois[:, 1:].unflatten(0, proposals.valid.shape)  # [B, K, 4]
        unmoved = boxes.new_zeros((1, 1, 4)).expand(*averaged.shape, 4)
        return select_boxes(averaged, unmoved, replace(proposals, boxes=boxes), sizes, config), scene

    def _predict_masks(
        self, rois: Tensor, labels: Tensor, origin: Tensor, carried: Scene
    ) -> tuple[Tensor, Tensor | None]:
        """The last stages' masks of the detections, averaged. Where the mask heads hand features on, they do so on the
        detections' own boxes, from the first one on."""
        features = self._mask_inputs(rois, carried)  # [R, C, 14, 14]
        hidden: Tensor | None = None if self.mpn is None else self.mpn.hidden(features)
        masks = []
        for number, stage in enumerate(map(self._stage, range(len(self.stages)))):
            if stage.mask_head is None:
                continue
            logits, hidden = stage.mask_head(fused(stage.fuse_mask, features, hidden), labels)
            if number >= len(self.stages) - self.config.mask_stages:
                masks.append(widen(logits[:, 0]).sigmoid())  # [R, m, m]
        return torch.stack(masks).mean(dim=0), None

    def _stage(self, number: int) -> CascadeStage:
        return cast(CascadeStage, self.stages[number])

    def _scene(self, levels: list[Tensor]) -> tuple[Scene, Tensor | None]:
        """What RoI features are taken from, and what the semantic map is read from."""
        if self.semantic is None:
            return Scene(levels[:-1], None), None
        features, hidden = self.semantic(levels)
        return Scene(levels[:-1], features), hidden

    def _scene_and_loss(self, levels: list[Tensor], sizes: Tensor, targets: Targets) -> tuple[Scene, dict[str, Tensor]]:
        scene, hidden = self._scene(levels)
        if self.semantic is None or hidden is None:
            return scene, {}
        size = (hidden.shape[-2], hidden.shape[-1])
        if self.config.semantic == "stuff":
            wanted = map_of_data(targets, size, self.config.semantic_classes)
        else:
            wanted = map_of_instances(targets, sizes, size)
        loss = semantic_loss(self.semantic.logits(hidden), wanted)
        return scene, {"loss_semantic": self.config.semantic_loss_weight * loss}

    def _first_guides(self, scene: Scene, rois: Tensor) -> Scene:
        """Masks of the proposals; nothing without a mask proposal network."""
        return scene

    def _next_guides(self, number: int, rois: Tensor, class_logits: Tensor, scene: Scene) -> Scene:
        """Masks of the RoIs that stage `number` has refined."""
        return scene

    def _classify(self, number: int, rois: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """A stage's class logits [R, num_classes + 1] and offsets [R, 1, 4]."""
        masks = scene.masks
        guidance = masks.guidance if masks is not None and self.config.sgra_box else None
        features = self.box_features(scene.levels, rois, guidance)  # [R, C, 7, 7]
        if self.semantic is not None and scene.semantic is not None:
            around = self.semantic.roi_features(scene.semantic, rois)  # [R, C, 14, 14]
            features = features + functional.adaptive_avg_pool2d(around, features.shape[-2:])
        stage = self._stage(number)
        if masks is not None:
            features = fused(stage.fuse_box, features, masks.features)
        logits, deltas = stage.box_head(features)
        return logits, deltas

    def _mask_inputs(self, rois: Tensor, scene: Scene) -> Tensor:  # [R, 5] -> [R, C, 14, 14]
        features: Tensor = self.mask_features(scene.levels, rois, None)
        if self.semantic is not None and scene.semantic is not None:
            features = features + self.semantic.roi_features(scene.semantic, rois)
        return features


def fused(fusion: Fusion | None, features: Tensor, before: Tensor | None) -> Tensor:
    """features, with those of the mask head before where both are there."""
    if fusion is None or before is None:
        return features
    return fusion(features, before)


def _average(logits: list[Tensor], of_probabilities: bool) -> Tensor:  # [R, classes + 1] each
    """Logits whose softmax is the average of the stages'."""
    if not of_probabilities:
        return torch.stack(logits).mean(dim=0)
    return torch.stack([one.softmax(dim=1) for one in logits]).mean(dim=0).log()
