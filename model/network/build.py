"""Puts a network together from its configuration. The only reader of `DetectorConfig`'s sizes."""

from typing import Any

from torch import nn

from dsg.model.network.anchors import AnchorGenerator
from dsg.model.network.backbones import BackboneWithPyramid, backbone_channels, backbone_normalisation
from dsg.model.network.config import DetectorConfig
from dsg.model.network.detector import Detector
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.fpn import FeaturePyramid
from dsg.model.network.heads import BoxHead, Fusion, MaskHead
from dsg.model.network.losses import RoISampler, RPNLoss
from dsg.model.network.matching import BalancedSampler
from dsg.model.network.presets import preset_config
from dsg.model.network.resnet import ResNet
from dsg.model.network.rpn import ProposalSelector, RPNHead
from dsg.ops import MultiScaleSgRoIAlign

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
            `fuse_box`, `sgra_mask`, and `fuse_kernel`, `fuse_activation`, `detach_guidance`, `proposals`,
            `max_detections`.

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
    outputs = config.num_classes + 1
    anchors = AnchorGenerator(
        config.anchor_sizes, config.anchor_ratios, config.anchor_rounding, config.anchor_strides_from_grid
    )

    def roi_features(side: int) -> MultiScaleSgRoIAlign:
        return MultiScaleSgRoIAlign(side, _ROI_SCALES, config.roi_sampling_ratio, config.roi_aligned)

    def fusion(wanted: bool) -> Fusion | None:
        return Fusion(config.channels, config.fuse_kernel, config.fuse_activation) if wanted else None

    return Detector(
        config=config,
        backbone=BackboneWithPyramid(body, FeaturePyramid(backbone_channels(body), config.channels)),
        anchors=anchors,
        rpn_head=RPNHead(config.channels, anchors.per_cell),
        selector=ProposalSelector(
            (config.rpn_candidates_train, config.rpn_candidates),
            (config.proposals_train, config.proposals),
            config.rpn_nms_iou,
            config.rpn_min_size,
        ),
        mpn=MaskHead(config.channels, 1) if config.mrpn else None,
        box_features=roi_features(config.box_pool),
        mask_features=roi_features(config.mask_pool),
        box_head=BoxHead(config.channels, config.box_pool, config.box_head_width, outputs),
        mask_head=MaskHead(config.channels, outputs if config.mask_per_class else 1),
        fuse_box=fusion(config.fuse_box),
        fuse_mask=fusion(config.fuse_mask),
        rpn_loss=RPNLoss(
            config.rpn_iou_positive,
            config.rpn_iou_negative,
            config.ignore_overlap,
            config.rpn_smooth_l1_beta,
            BalancedSampler(config.rpn_samples, 0.5),
        ),
        roi_sampler=RoISampler(
            config.roi_iou_positive,
            config.ignore_overlap,
            BalancedSampler(config.roi_samples, config.roi_positive_fraction),
        ),
    )


def _body(config: DetectorConfig) -> nn.Module:
    if config.backbone in ("lite0", "lite2"):
        return EfficientNetLite(int(config.backbone[-1]), norm_eps=config.norm_eps, frozen_blocks=config.frozen_stages)
    depth = {"resnet50": 50, "resnet101": 101}[config.backbone]
    return ResNet(depth, norm_eps=config.norm_eps, frozen_stages=config.frozen_stages)
