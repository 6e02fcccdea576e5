"""Cascades in which the masks of a stage guide the boxes of the next: Cascade DSG and HTC DSG (paper, section 3.5), and
their successor DSC (version 4 of the paper, CVPR 2021).

Eq. 3, its last line read as B^{t+1} = b^{t+1}(...): stage 0 is the mask-supervised RPN, which gives proposals B^0,
their masks M^0 and features F_-^0. Then for t = 0, 1, ...

    B^{t+1} = b^{t+1}(SgRoIAlign(B^t, F, M^t) + w_b^{t+1} F_-^t)
    M^{t+1}, F_-^{t+1} = m^{t+1}(RoIAlign(B^{t+1}, F) + w_m^{t+1} F_-^t)

The HTC variant adds a semantic branch. DSC has guidance of one class at every stage, and one mask head at the end.

R RoIs of a batch in one list, P of them with a mask to learn, C channels, m side of a mask.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dsg.model.network.cascade import CascadeDetector, Scene, fused
from dsg.model.network.cascade_samples import assign, is_truth, refine, select
from dsg.model.network.detector import rounded_up
from dsg.model.network.losses import crop_masks, mask_loss, rows_with_mask
from dsg.model.network.rpn import widen
from dsg.model.network.types import Proposals, Targets


class GuidedCascade(CascadeDetector):
    """A `CascadeDetector` whose `mpn` is there.

    In training RoIs are sampled once, so that every stage finds the masks of its own RoIs in the same rows; stages
    assign them anew with their own thresholds. RoIs that are ground truth stay where they are. Mask heads run on all
    RoIs, and learn from those that overlap an instance by half or more (section 4.1), whatever the stage's threshold.
    """

    def _roi_losses(
        self, levels: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        config = self.config
        scene, result = self._scene_and_loss(levels, sizes, targets)
        samples = self.roi_samplers[0](proposals, targets)
        fixed = is_truth(samples, targets)  # [R]
        rois = samples.rois  # [R, 5]
        scene = self._first_guides(scene, rois)
        rows, wanted = self._wanted_masks(rois, targets)  # [P], [P, m, m]
        assert scene.masks is not None
        result["loss_proposal_mask"] = mask_loss(scene.masks.logits[rows], wanted)
        for number, threshold in enumerate(config.stage_ious):
            logits, deltas = self._classify(number, rois, scene)
            assigned, usable = assign(rois, targets, threshold, config.ignore_overlap)
            result |= self._box_losses(number, logits[usable], deltas[usable], select(assigned, usable), targets)
            refined = refine(rois, deltas, config.stage_delta_weights[number], sizes)
            rois = torch.where(fixed[:, None], rois, refined)
            scene, loss = self._learn_masks(number, rois, logits, scene, targets)
            result |= self._weighted_mask_loss(number, loss)
        return result

    def _learn_masks(
        self, number: int, rois: Tensor, class_logits: Tensor, scene: Scene, targets: Targets
    ) -> tuple[Scene, Tensor]:
        """The masks of a stage as guides of the next, and their loss. After the last stage nothing is guided: its mask
        head runs on the RoIs that it learns from alone."""
        head, fusion = self._stage(number).mask_head, self._stage(number).fuse_mask
        assert scene.masks is not None and head is not None
        assigned, _ = assign(rois, targets, self.config.roi_iou_positive, self.config.ignore_overlap)
        rows, wanted = self._wanted_masks(rois, targets)
        labels = assigned.labels[rows]
        if number + 1 == len(self.stages):
            filled = rounded_up(rows)  # [Q], Q >= P
            inputs = fused(fusion, self._mask_inputs(rois[filled], scene), scene.masks.features[filled])
            upscaled = head.upscaled(head.hidden(inputs))[: len(rows)]  # [P, C, m, m]
            return scene, mask_loss(head.masks_of(upscaled, labels)[:, 0], wanted)
        inputs = fused(fusion, self._mask_inputs(rois, scene), scene.masks.features)
        hidden = head.hidden(inputs)  # [R, C, 14, 14]
        upscaled = head.upscaled(hidden)  # [R, C, m, m]
        guides = head.masks_of(upscaled, _foreground(class_logits))[:, 0]  # [R, m, m]
        loss = mask_loss(head.masks_of(upscaled[rows], labels)[:, 0], wanted)
        return replace(scene, masks=self._as_guide(guides, hidden)), loss

    def _wanted_masks(self, rois: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """RoIs that masks are learned from, int64 [P], and what they should be, [P, m, m]."""
        config = self.config
        assigned, _ = assign(rois, targets, config.roi_iou_positive, config.ignore_overlap)
        rows = rows_with_mask(assigned, targets)
        return rows, crop_masks(targets, assigned, rows, 2 * config.mask_pool, config.roi_aligned)

    def _predict_masks(
        self, rois: Tensor, labels: Tensor, origin: Tensor, carried: Scene
    ) -> tuple[Tensor, Tensor | None]:
        if self.config.mask_stages > 1:
            return super()._predict_masks(rois, labels, origin, carried)
        # One mask head, as it was trained: with the features that the stage before found for the same proposal.
        stage = self._stage(len(self.stages) - 1)
        assert carried.masks is not None and stage.mask_head is not None
        inputs = fused(stage.fuse_mask, self._mask_inputs(rois, carried), carried.masks.features[origin])
        logits, _ = stage.mask_head(inputs, labels)
        return widen(logits[:, 0]).sigmoid(), None

    def _first_guides(self, scene: Scene, rois: Tensor) -> Scene:
        assert self.mpn is not None
        logits, features = self.mpn(self._mask_inputs(rois, scene))  # [R, 1, m, m], [R, C, 14, 14]
        return replace(scene, masks=self._as_guide(logits[:, 0], features))

    def _next_guides(self, number: int, rois: Tensor, class_logits: Tensor, scene: Scene) -> Scene:
        stage = self._stage(number)
        assert scene.masks is not None and stage.mask_head is not None
        inputs = fused(stage.fuse_mask, self._mask_inputs(rois, scene), scene.masks.features)
        logits, hidden = stage.mask_head(inputs, _foreground(class_logits))  # [R, 1, m, m], [R, C, 14, 14]
        return replace(scene, masks=self._as_guide(logits[:, 0], hidden))


def _foreground(class_logits: Tensor) -> Tensor:  # [R, num_classes + 1] -> int64 [R] in 1..num_classes
    """The likeliest class but background; the same rule in training and at test time."""
    return class_logits[:, 1:].argmax(dim=1) + 1
