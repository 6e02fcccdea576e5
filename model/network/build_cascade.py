"""Puts cascades together, and what they share with the networks of one stage."""

from typing import Any

from dsg.model.network.cascade import CascadeDetector, CascadeStage
from dsg.model.network.config import DetectorConfig
from dsg.model.network.guided_cascade import GuidedCascade
from dsg.model.network.heads import BoxHead, Fusion, MaskHead
from dsg.model.network.losses import RoISampler
from dsg.model.network.matching import BalancedSampler
from dsg.model.network.semantic import SemanticBranch


def build_cascade(config: DetectorConfig, shared: dict[str, Any]) -> CascadeDetector:
    """A cascade.

    Args:
        shared: parts that it has in common with the networks of one stage, by the names of its constructor.
    """
    kind = GuidedCascade if config.mrpn else CascadeDetector
    return kind(
        stages=[_stage(config, number) for number in range(len(config.stage_ious))],
        semantic=_semantic(config),
        roi_samplers=[roi_sampler(config, threshold) for threshold in config.stage_ious],
        **shared,
    )


def _semantic(config: DetectorConfig) -> SemanticBranch | None:
    if config.semantic == "off":
        return None
    return SemanticBranch(
        config.channels,
        config.semantic_classes if config.semantic == "stuff" else config.num_classes + 1,
        len(config.anchor_sizes),
        config.mask_pool,
        config.roi_sampling_ratio,
        config.roi_aligned,
    )


def _stage(config: DetectorConfig, number: int) -> CascadeStage:
    outputs = config.num_classes + 1
    predicts = number >= len(config.stage_ious) - config.mask_stages
    mask_outputs = outputs if config.mask_per_class and (predicts or config.guidance_per_class) else 1
    if config.mrpn:
        fuse_mask = fusion(config, config.fuse_mask)
    else:  # what HTC's mask heads hand on goes through a 1x1 convolution, and the first has no one before it
        fuse_mask = Fusion(config.channels, 1, activation=True) if config.interleaved and number else None
    return CascadeStage(
        box_head=BoxHead(config.channels, config.box_pool, config.box_head_width, outputs, per_class=False),
        mask_head=MaskHead(config.channels, mask_outputs) if predicts or config.mrpn else None,
        fuse_box=fusion(config, config.fuse_box),
        fuse_mask=fuse_mask,
    )


def fusion(config: DetectorConfig, wanted: bool) -> Fusion | None:
    """Brings mask features into a head, where that is wanted."""
    return Fusion(config.channels, config.fuse_kernel, config.fuse_activation) if wanted else None


def roi_sampler(config: DetectorConfig, positive_iou: float) -> RoISampler:
    """Chooses the RoIs of the heads' losses."""
    return RoISampler(
        positive_iou, config.ignore_overlap, BalancedSampler(config.roi_samples, config.roi_positive_fraction)
    )
