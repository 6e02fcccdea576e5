"""Puts a network together from its configuration. The only reader of `DetectorConfig`'s sizes."""

from typing import Any

from torch import nn

from dsg.model.network.anchors import AnchorGenerator
from dsg.model.network.backbones import BackboneWithPyramid, backbone_channels, backbone_normalisation
from dsg.model.network.build_cascade import build_cascade, fusion, roi_sampler
from dsg.model.network.config import DetectorConfig
from dsg.model.network.deep_box_head import DeepBoxHead
from dsg.model.network.detector import Detector
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.fpn import FeaturePyramid
from dsg.model.network.heads import BoxHead, MaskHead
from dsg.model.network.losses import RPNLoss
from dsg.model.network.mask_iou import MaskIoUHead
from dsg.model.network.mask_rcnn import MaskRCNN
from dsg.model.network.matching import BalancedSampler
from dsg.model.network.panet import AdaptiveRoIFeatures, PathAggregationPyramid
from dsg.model.network.presets import preset_config
from dsg.model.network.resnet import ResNet
from dsg.model.network.rpn import ProposalSelector, RPNHead
from dsg.ops import MultiScaleSgRoIAlign

# name -> depth, groups, channels of a group in the first stage
_RESNETS = {
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnext101_32x4d": (101, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
}
# P2 to P5; P6 serves the RPN alone
_ROI_SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def build(name: str, num_classes: int = 80, backbone: nn.Module | None = None, **overrides: Any) -> Detector:
    """A network by name, with random weights, in training mode.

    Args:
        name: one of `presets()`.
        num_classes: foreground classes; labels are 1..num_classes.
        backbone: a module that gives [C2, C3, C4, C5] (strides 4, 8, 16, 32) in place of the preset's, for example
            from timm; `backbones` says how its channels and the normalisation it wants are known.
        overrides: fields of `DetectorConfig`, among them the paper's switches `mrpn`, `fuse_mask`, `sgra_box`,
            `fuse_box`, `sgra_mask`, and `fuse_kernel`, `fuse_activation`, `detach_guidance`, `mask_iou`, `panet`,
            `proposals`, `max_detections`.

    Raises:
        ValueError: an unknown name or override, or values that do not go together.
    """
    if backbone is not None:
        mean, std = backbone_normalisation(backbone)
        overrides = {"pixel_mean": mean, "pixel_std": std, **overrides}
    return build_from_config(preset_config(name, num_classes, **overrides), backbone)


def build_from_config(config: DetectorConfig, backbone: nn.Module | None = None) -> Detector:
    """`build`, from a configuration."""
    body = _body(config) if backbone is None else backbone
    anchors = AnchorGenerator(
        config.anchor_sizes,
        config.anchor_ratios,
        config.anchor_rounding,
        config.anchor_strides_from_grid,
        config.anchor_centre,
    )
    shared: dict[str, Any] = {
        "config": config,
        "backbone": BackboneWithPyramid(body, _pyramid(config, backbone_channels(body))),
        "anchors": anchors,
        "rpn_head": RPNHead(config.channels, anchors.per_cell, depth=2 if config.normalised_heads else 1),
        "selector": ProposalSelector(
            (config.rpn_candidates_train, config.rpn_candidates),
            (config.proposals_train, config.proposals),
            config.rpn_nms_iou,
            config.rpn_min_size,
        ),
        "mpn": MaskHead(config.channels, 1) if config.mrpn else None,
        "box_features": _roi_features(config, config.box_pool),
        "mask_features": _roi_features(config, config.mask_pool),
        "rpn_loss": RPNLoss(
            config.rpn_iou_positive,
            config.rpn_iou_negative,
            config.ignore_overlap,
            config.rpn_smooth_l1_beta,
            BalancedSampler(config.rpn_samples, 0.5),
        ),
    }
    if config.cascade:
        return build_cascade(config, shared)
    outputs = config.num_classes + 1
    box_head: type[nn.Module] = DeepBoxHead if config.normalised_heads else BoxHead
    return MaskRCNN(
        box_head=box_head(config.channels, config.box_pool, config.box_head_width, outputs),
        mask_head=MaskHead(config.channels, outputs if config.mask_per_class else 1, config.normalised_heads),
        fuse_box=fusion(config, config.fuse_box),
        fuse_mask=fusion(config, config.fuse_mask),
        mask_iou=MaskIoUHead(config.channels, config.box_head_width, outputs) if config.mask_iou else None,
        roi_sampler=roi_sampler(config, config.roi_iou_positive),
        **shared,
    )


def _pyramid(config: DetectorConfig, channels: tuple[int, ...]) -> FeaturePyramid:
    if config.panet:
        return PathAggregationPyramid(channels, config.channels)
    return FeaturePyramid(channels, config.channels, config.normalised_heads)


def _roi_features(config: DetectorConfig, side: int) -> nn.Module:
    if config.panet:
        return AdaptiveRoIFeatures(config.channels, side, _ROI_SCALES, config.roi_sampling_ratio, config.roi_aligned)
    return MultiScaleSgRoIAlign(side, _ROI_SCALES, config.roi_sampling_ratio, config.roi_aligned)


def _body(config: DetectorConfig) -> nn.Module:
    if config.backbone in ("lite0", "lite2"):
        return EfficientNetLite(int(config.backbone[-1]), norm_eps=config.norm_eps, frozen_blocks=config.frozen_stages)
    depth, groups, width = _RESNETS[config.backbone]
    return ResNet(
        depth,
        groups=groups,
        width_per_group=width,
        norm_eps=config.norm_eps,
        stride_in_1x1=config.stride_in_1x1,
        frozen_stages=config.frozen_stages,
        deformable=config.dcn,
        modulated=config.dcn_modulated,
    )
