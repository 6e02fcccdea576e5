"""ResNet-50 and -101 (ResNeXt through `groups`) as backbones: images in, C2 to C5 out.

Modules carry the names of torchvision's ResNet (`conv1`, `bn1`, `layer1.0.downsample.0`, ...), so that its
state dicts fit as they are. Letters: B images, C channels, H and W height and width.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dsg.model.network.config import IMAGENET_MEAN, IMAGENET_STD
from dsg.model.network.deformable import DeformableConv
from dsg.model.network.norm import FrozenBatchNorm2d, convolve_normalise_relu

BLOCKS_OF_DEPTH = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # blocks of layer1 to layer4
EXPANSION = 4  # output channels of a block per channel of its stage's base width


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, added to the input (through a strided 1x1 where shapes differ).

    Args:
        in_channels: channels of the input.
        planes: base width of the stage (64 to 512); the block gives `4 * planes` channels.
        stride: 1, or 2 in the first block of layer2 to layer4.
        groups: groups of the 3x3 convolution.
        width_per_group: its channels per group where `planes` is 64.
        stride_in_1x1: put the stride into the first 1x1 instead of the 3x3.
        norm_eps: eps of the batch norms.
        deformable: the 3x3 convolution is deformable; modulated: in its second version.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        groups: int,
        width_per_group: int,
        stride_in_1x1: bool,
        norm_eps: float,
        deformable: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        width = planes * width_per_group // 64 * groups
        out_channels = planes * EXPANSION
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride_1x1, bias=False)
        self.bn1 = FrozenBatchNorm2d(width, norm_eps)
        self.conv2: nn.Conv2d | DeformableConv = (
            DeformableConv(width, width, stride_3x3, groups, modulated)
            if deformable
            else nn.Conv2d(width, width, 3, stride=stride_3x3, padding=1, groups=groups, bias=False)
        )
        self.bn2 = FrozenBatchNorm2d(width, norm_eps)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(out_channels, norm_eps)
        self.downsample: nn.Module = nn.Identity()  # adds no keys, like torchvision's None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                FrozenBatchNorm2d(out_channels, norm_eps),
            )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 * planes, H / stride, W / stride]
        out = convolve_normalise_relu(self.conv1, self.bn1, x)
        if isinstance(self.conv2, DeformableConv):
            out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        else:
            out = convolve_normalise_relu(self.conv2, self.bn2, out)
        return convolve_normalise_relu(self.conv3, self.bn3, out, self.downsample(x))


class ResNet(nn.Module):
    """Bottleneck ResNet without its classifier.

    `forward(images [B, 3, H, W])`, normalised with `pixel_mean` and `pixel_std`, gives `[C2, C3, C4, C5]`,
    finest first: `out_channels` channels at `strides`, sizes rounded up.

    Args:
        depth: 50 or 101.
        groups: groups of the 3x3 convolutions; with `width_per_group` it makes a ResNeXt (32 and 4: "32x4d").
        width_per_group: channels of a group in layer1.
        norm_eps: eps of the batch norms; a property of the weights.
        stride_in_1x1: strides sit in the first 1x1 of a block, as in the MSRA weights that detectron2 starts
            from; False puts them into the 3x3, as torchvision does.
        frozen_stages: how many of stem, layer1, ..., layer4 keep their weights in training; 2 freezes stem
            and layer1, 0 trains all.
        deformable: deformable 3x3 convolutions in layer2 to layer4, the paper's stages 3 to 5.
        modulated: their second version.

    Raises:
        ValueError: `depth` is unknown or `frozen_stages` not in 0..5.
    """

    pixel_mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    pixel_std: ClassVar[tuple[float, float, float]] = IMAGENET_STD
    # tensors of a weight file that the backbone has no use for
    classifier_prefixes: ClassVar[tuple[str, ...]] = ("fc.",)
    # modules that start fresh where a weight file lacks them
    optional_parts: ClassVar[tuple[str, ...]] = (".conv2.offset",)
    out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __init__(
        self,
        depth: int = 50,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        frozen_stages: int = 2,
        deformable: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS_OF_DEPTH:
            raise ValueError(f"ResNet depth {depth} is unknown: use one of {sorted(BLOCKS_OF_DEPTH)}")
        if not 0 <= frozen_stages <= 5:
            raise ValueError(f"frozen_stages is {frozen_stages}: use 0 (train all) to 5 (train nothing)")

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64, norm_eps)
        in_channels = 64
        for stage, block_count in enumerate(BLOCKS_OF_DEPTH[depth]):
            blocks = []
            for index in range(block_count):
                blocks.append(
                    Bottleneck(
                        in_channels,
                        planes=64 * 2**stage,
                        stride=2 if stage > 0 and index == 0 else 1,
                        groups=groups,
                        width_per_group=width_per_group,
                        stride_in_1x1=stride_in_1x1,
                        norm_eps=norm_eps,
                        deformable=deformable and stage > 0,
                        modulated=modulated,
                    )
                )
                in_channels = self.out_channels[stage]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith(self.optional_parts):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        stages = [self.conv1, *self._layers()]
        for stage_module in stages[:frozen_stages]:
            stage_module.requires_grad_(False)

    def _layers(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{stage}") for stage in (1, 2, 3, 4)]

    def forward(self, images: Tensor) -> list[Tensor]:  # [B, 3, H, W] -> 4 x [B, C, H / stride, W / stride]
        """Features C2 to C5 of normalised images, finest first."""
        x = convolve_normalise_relu(self.conv1, self.bn1, images)  # [B, 64, H/2, W/2]
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # [B, 64, H/4, W/4]
        features = []
        for layer in self._layers():
            x = layer(x)
            features.append(x)
        return features
