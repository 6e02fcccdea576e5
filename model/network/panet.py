"""PANet (arXiv 1803.01534): short ways from fine levels to all others.

Letters: B images, R RoIs, C channels, H and W height and width, P side of the pooled features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsg.model.network.fpn import FeaturePyramid
from dsg.ops import sg_roi_align


class PathAggregationPyramid(FeaturePyramid):
    """A `FeaturePyramid` with a bottom-up path on it (section 3.1): each level takes up the one finer than itself
    through a 3x3 convolution of stride 2, and the sum goes through another one; ReLU after both."""

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256) -> None:
        super().__init__(in_channels, out_channels)
        steps = range(len(in_channels) - 1)
        self.down = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1) for _ in steps)
        self.joined = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in steps)
        for conv in (*self.down, *self.joined):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # L x [B, C_l, H_l, W_l] -> L + 1 levels
        """Levels as in `FeaturePyramid`."""
        levels = super().forward(features)[:-1]
        for number, (down, joined) in enumerate(zip(self.down, self.joined, strict=True)):
            finer = F.relu(down(levels[number]), inplace=True)  # [B, C, H_l, W_l] of the next level
            levels[number + 1] = F.relu(joined(finer + levels[number + 1]), inplace=True)
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


class AdaptiveRoIFeatures(nn.Module):
    """RoI features from all levels (section 3.2): each level's go through a convolution of its own, and the largest
    value of each place is kept.

    The paper lets the first layer of each head be that layer; a 3x3 convolution apart from the heads serves all of
    them, the mask proposal network too.

    Args:
        channels: C.
        side: P.
        scales: feature pixels per image pixel of each level.
        sampling_ratio, aligned: as in `sg_roi_align`.
    """

    def __init__(self, channels: int, side: int, scales: tuple[float, ...], sampling_ratio: int, aligned: bool) -> None:
        super().__init__()
        self.side = side
        self.scales = scales
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in scales)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, levels: list[Tensor], rois: Tensor, guidance: Tensor | None = None) -> Tensor:
        """levels [B, C, H_l, W_l] each, rois [R, 5] in image pixels, guidance [R, m, m] or None -> [R, C, P, P]."""
        largest: Tensor | None = None
        for level, scale, conv in zip(levels, self.scales, self.convs, strict=True):
            pooled = sg_roi_align(level, rois, guidance, self.side, scale, self.sampling_ratio, self.aligned)
            features = F.relu(conv(pooled), inplace=True)  # [R, C, P, P]
            largest = features if largest is None else torch.maximum(largest, features)
        assert largest is not None  # a pyramid has levels
        return largest
