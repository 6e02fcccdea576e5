"""The networks by name. The only place, with `config.py`, where numbers of a network are written."""

from dataclasses import replace
from typing import Any

from dsg.model.network.config import FIELD_NAMES, DetectorConfig
from dsg.model.network.efficientnet_lite import EfficientNetLite

# name in a preset -> what that backbone asks for
_RESNET = {"channels": 256, "box_head_width": 1024}
_LITE = {
    "channels": 128,
    "box_head_width": 512,
    "pixel_mean": EfficientNetLite.pixel_mean,
    "pixel_std": EfficientNetLite.pixel_std,
    "norm_eps": 1e-3,
    "frozen_stages": 0,
    # small pictures on small machines: anchors from 16 pixels, fewer proposals, fewer sampled RoIs
    "anchor_sizes": ((16.0, 22.6), (32.0, 45.3), (64.0, 90.5), (128.0, 181.0), (256.0, 362.0)),
    "rpn_candidates": 500,
    "proposals": 200,
    "rpn_candidates_train": 600,
    "proposals_train": 600,
    "roi_samples": 256,
}
_RESNETS: dict[str, dict[str, Any]] = {
    "r50": {"backbone": "resnet50", **_RESNET},
    "r101": {"backbone": "resnet101", **_RESNET},
    "x101_32x4d": {"backbone": "resnext101_32x4d", **_RESNET},
    "x101_32x8d": {"backbone": "resnext101_32x8d", **_RESNET},
    "x101_64x4d": {"backbone": "resnext101_64x4d", **_RESNET},
}
_BACKBONES: dict[str, dict[str, Any]] = {
    **_RESNETS,
    "lite0": {"backbone": "lite0", **_LITE},
    "lite2": {"backbone": "lite2", **_LITE},
    **{f"{name}_dcn": {**parts, "dcn": True} for name, parts in _RESNETS.items()},
}
# the four designs of the paper's full model; SgRA_M is its rejected fifth
_DSG = {"mrpn": True, "fuse_mask": True, "sgra_box": True, "fuse_box": True}
# instances are all that most data know; overrides.semantic is "stuff" where there are maps, "off" without the branch
_HTC = {"cascade": True, "semantic": "instances"}
_SYSTEMS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {},
    "dsg": _DSG,
    "cascade_mask_rcnn": {"cascade": True},
    "cascade_dsg": {"cascade": True, **_DSG},
    "htc": {**_HTC, "interleaved": True},
    "htc_dsg": {**_HTC, **_DSG},
    # the successor's own loss weights and average of scores
    "dsc": {
        **_HTC,
        **_DSG,
        "guidance_per_class": False,
        "mask_stages": 1,
        "score_stages": 2,
        "stage_class_loss_weights": (1.0, 1.0, 1.0),
        "stage_box_loss_weights": (1.0, 0.5, 0.5),
        "stage_mask_loss_weights": (1.0, 1.0, 1.0),
    },
}
_PRESETS: dict[str, DetectorConfig] = {
    f"{system}_{backbone}_fpn": DetectorConfig(**parts, **switches)
    for system, switches in _SYSTEMS.items()
    for backbone, parts in _BACKBONES.items()
}
# torchvision's second recipe
_PRESETS["mask_rcnn_r50_v2_fpn"] = DetectorConfig(**_RESNETS["r50"], normalised_heads=True)


def presets() -> list[str]:
    """Names that `build` takes."""
    return list(_PRESETS)


def preset_config(name: str, num_classes: int = 80, **overrides: Any) -> DetectorConfig:
    """The configuration of a preset with fields replaced.

    Args:
        name: one of `presets()`.
        num_classes: foreground classes.
        overrides: fields of `DetectorConfig`; lists become tuples, so that what came from JSON fits.

    Raises:
        ValueError: an unknown preset or field, or values that do not go together.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(_PRESETS)}")
    unknown = sorted(set(overrides) - set(FIELD_NAMES))
    if unknown:
        raise ValueError(f"unknown override {', '.join(unknown)}; known are {', '.join(FIELD_NAMES)}")
    preset = _PRESETS[name]
    for field, value in overrides.items():
        default = getattr(preset, field)
        if isinstance(default, bool) != isinstance(value, bool):
            raise ValueError(f"override {field} must be {type(default).__name__}, got {value!r}")
    return replace(preset, **{**{k: as_tuple(v) for k, v in overrides.items()}, "num_classes": num_classes})


def as_tuple(value: Any) -> Any:
    """Lists, as JSON and TOML give them, to the tuples that a frozen dataclass holds."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
