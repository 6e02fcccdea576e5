"""EfficientNet-Lite0 and -Lite2 as backbones: images in, C2 to C5 out; small enough for two CPU cores.

The networks of TensorFlow's EfficientNet-Lite: inverted residual blocks, ReLU6, no squeeze-and-excite.
Letters: B images, C channels, H and W height and width.
"""

import math
from typing import ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from dsg.model.network.depthwise import depthwise_relu6, has_kernel
from dsg.model.network.fused import convolve_by_pixel
from dsg.model.network.norm import FrozenBatchNorm2d, convolve_and_normalise
from dsg.model.network.whole import WholeConv2d


class Stage(NamedTuple):
    """A run of blocks at width 1.0 and depth 1.0; only the first block has the stride."""

    expand: int
    kernel: int
    stride: int
    channels: int
    repeats: int


STAGES = (
    Stage(expand=1, kernel=3, stride=1, channels=16, repeats=1),
    Stage(expand=6, kernel=3, stride=2, channels=24, repeats=2),
    Stage(expand=6, kernel=5, stride=2, channels=40, repeats=2),
    Stage(expand=6, kernel=3, stride=2, channels=80, repeats=3),
    Stage(expand=6, kernel=5, stride=1, channels=112, repeats=3),
    Stage(expand=6, kernel=5, stride=2, channels=192, repeats=4),
    Stage(expand=6, kernel=3, stride=1, channels=320, repeats=1),
)
FEATURE_STAGES = (1, 2, 4, 6)  # the last stages of strides 4, 8, 16 and 32
STEM_CHANNELS = 32  # at every width
WIDTH_AND_DEPTH = {0: (1.0, 1.0), 2: (1.1, 1.2)}  # of each variant


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, but never less than nine tenths of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def depthwise_conv(channels: int, kernel: int, stride: int) -> WholeConv2d:
    return WholeConv2d(channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False)


class InvertedResidual(nn.Module):
    """1x1 up (none where `expand` is 1), depthwise k x k, 1x1 down without activation; added to the input
    where the shapes agree.

    Padding is k // 2 on every side. TensorFlow, where the weights come from, pads strided convolutions more
    on the right and below. Doing so takes a padding step before each of them, whose amounts depend on the
    input's size: a copy of the feature map, and arithmetic on shapes in every exported graph. Without it,
    classification with ImageNet weights loses next to nothing, and a fine-tuned detector learns the shift.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, expand: int, kernel: int, stride: int, norm_eps: float
    ) -> None:
        super().__init__()
        hidden = in_channels * expand
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expands = expand != 1
        if self.expands:
            self.expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self.bn0 = FrozenBatchNorm2d(hidden, norm_eps)
        self.depthwise_conv = depthwise_conv(hidden, kernel, stride)
        self.bn1 = FrozenBatchNorm2d(hidden, norm_eps)
        self.project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn2 = FrozenBatchNorm2d(out_channels, norm_eps)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, out_channels, H / stride, W / stride]
        expanded = _by_pixel(self.expand_conv, self.bn0, x) if self.expands else x  # [B, hidden, H, W]
        out = _by_pixel(self.project_conv, self.bn2, self._by_place(expanded))
        if self.has_residual:
            out += x
        return out

    def _by_place(self, expanded: Tensor) -> Tensor:  # [B, hidden, H, W] -> [B, hidden, H / stride, W / stride]
        """ReLU6, the depthwise convolution with its norm, and ReLU6 again."""
        network = self.project_conv.weight.dtype
        is_narrowed = network != self.depthwise_conv.weight.dtype
        if has_kernel(self.depthwise_conv, expanded):
            return depthwise_relu6(self.depthwise_conv, self.bn1, expanded, network if is_narrowed else expanded.dtype)
        out = F.relu6(expanded, inplace=True) if self.expands else expanded  # the stem has had its own
        if is_narrowed:
            out = out.to(self.depthwise_conv.weight.dtype)
        out = F.relu6(convolve_and_normalise(self.depthwise_conv, self.bn1, out), inplace=True)
        return out.to(network) if is_narrowed else out


def _by_pixel(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution and its norm; one that was folded away leaves a product of matrices."""
    if isinstance(norm, nn.Identity):
        return convolve_by_pixel(convolution, x)
    return convolve_and_normalise(convolution, norm, x)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier.

    `forward(images [B, 3, H, W])`, normalised with `pixel_mean` and `pixel_std`, gives `[C2, C3, C4, C5]`,
    finest first: `out_channels` channels (24, 40, 112, 320 for Lite0; 24, 48, 120, 352 for Lite2) at
    `strides`, sizes rounded up. No activation follows a block, so features hold negative values too.

    Args:
        variant: 0 or 2.
        norm_eps: eps of the batch norms; 1e-3 belongs to the ImageNet weights.
        frozen_blocks: 0 trains everything; n >= 1 freezes the stem and the first n of 16 (Lite0) or 21
            (Lite2) blocks.

    Raises:
        ValueError: `variant` is unknown or `frozen_blocks` out of range.
    """

    pixel_mean: ClassVar[tuple[float, float, float]] = (127 / 255, 127 / 255, 127 / 255)  # RGB in 0..1
    pixel_std: ClassVar[tuple[float, float, float]] = (128 / 255, 128 / 255, 128 / 255)
    # tensors of a weight file that the backbone has no use for
    classifier_prefixes: ClassVar[tuple[str, ...]] = ("conv_head.", "bn1.", "fc.")
    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(self, variant: int = 0, *, norm_eps: float = 1e-3, frozen_blocks: int = 0) -> None:
        super().__init__()
        if variant not in WIDTH_AND_DEPTH:
            known = sorted(WIDTH_AND_DEPTH)
            raise ValueError(f"EfficientNet-Lite variant {variant} is unknown: use one of {known}")
        width, depth = WIDTH_AND_DEPTH[variant]

        self.conv_stem = WholeConv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        self.bn0 = FrozenBatchNorm2d(STEM_CHANNELS, norm_eps)
        self.blocks = nn.ModuleList()
        last_blocks = []  # index of each stage's last block
        stage_channels = []
        in_channels = STEM_CHANNELS
        for index, stage in enumerate(STAGES):
            at_an_end = index in (0, len(STAGES) - 1)  # first and last stage never grow in depth
            repeats = stage.repeats if at_an_end else math.ceil(stage.repeats * depth)
            out_channels = round_channels(stage.channels * width)
            for repeat in range(repeats):
                self.blocks.append(
                    InvertedResidual(
                        in_channels,
                        out_channels,
                        expand=stage.expand,
                        kernel=stage.kernel,
                        stride=stage.stride if repeat == 0 else 1,
                        norm_eps=norm_eps,
                    )
                )
                in_channels = out_channels
            last_blocks.append(len(self.blocks) - 1)
            stage_channels.append(out_channels)
        self.feature_blocks = tuple(last_blocks[stage] for stage in FEATURE_STAGES)
        self.out_channels: tuple[int, ...] = tuple(stage_channels[stage] for stage in FEATURE_STAGES)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # fan_out would count the channels of depthwise convolutions, each of which has one input: outputs
                # so small that nothing of an image reaches C5.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if not 0 <= frozen_blocks <= len(self.blocks):
            raise ValueError(f"frozen_blocks is {frozen_blocks}: use 0 (train all) to {len(self.blocks)}")
        if frozen_blocks > 0:
            for frozen in (self.conv_stem, *self.blocks[:frozen_blocks]):
                frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:  # [B, 3, H, W] -> 4 x [B, C, H / stride, W / stride]
        """Features C2 to C5 of normalised images, finest first."""
        # The first depthwise convolution magnifies the rounding of what it reads more than all others do: it gets the
        # stem's float32 in half precision, too.
        if cast(nn.Conv2d, self.blocks[0].project_conv).weight.dtype != self.conv_stem.weight.dtype:
            images = images.to(self.conv_stem.weight.dtype)
        x = F.relu6(convolve_and_normalise(self.conv_stem, self.bn0, images), inplace=True)  # [B, 32, H/2, W/2]
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.feature_blocks:
                features.append(x)
        return features
