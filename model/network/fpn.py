"""Feature pyramid: C2 to C5 of a backbone become P2 to P6 with one number of channels.

Letters: B images, C channels, H and W height and width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsg.model.network.fused import convolve_by_pixel
from dsg.model.network.tracing import is_traced


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, a top-down path that adds each coarser level to the next finer one, and a 3x3
    convolution on every sum. One level more, at twice the coarsest stride, is every other cell of P5.

    `forward([C2, .., C5])` gives `[P2, .., P6]`, all `[B, out_channels, H_l, W_l]`.

    Args:
        in_channels: channels of the backbone's levels, finest first.
        out_channels: channels of the pyramid.
        normalised: batch norm after each convolution, in place of its bias.

    Raises:
        ValueError: `in_channels` is empty.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, normalised: bool = False) -> None:
        super().__init__()
        if not in_channels:
            raise ValueError("in_channels is empty: give the channels of each backbone level, finest first")
        self.in_channels = tuple(in_channels)
        self.out_channels = out_channels
        bias = not normalised
        self.inner = nn.ModuleList(nn.Conv2d(channels, out_channels, 1, bias=bias) for channels in in_channels)
        self.outer = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias) for _ in in_channels)
        norms = [nn.BatchNorm2d(out_channels) if normalised else nn.Identity() for _ in range(2 * len(in_channels))]
        self.inner_norms = nn.ModuleList(norms[: len(in_channels)])
        self.outer_norms = nn.ModuleList(norms[len(in_channels) :])
        for conv in (*self.inner, *self.outer):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if bias:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # L x [B, C_l, H_l, W_l] -> L + 1 levels
        """Pyramid levels, finest first; each has the size of its backbone level, the last is half the one
        before it, rounded up.

        Raises:
            ValueError: the number of levels is not that of `in_channels`.
        """
        if len(features) != len(self.inner):
            raise ValueError(f"the pyramid got {len(features)} levels: give {len(self.inner)}, finest first")
        merged = self._lateral(features, len(features) - 1)  # [B, out_channels, H_l, W_l]
        levels = [self._smoothed(merged, len(features) - 1)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self._lateral(features, level)
            # to the finer level's own size: twice the coarser one is a cell too many where a side is odd
            merged = lateral + _repeated(merged, lateral)
            levels.append(self._smoothed(merged, level))
        levels.reverse()
        # Every other cell. Of a pooling torch 2.11 records that sides have as odd a number of cells as the example's.
        coarsest = levels[-1]
        levels.append(_every_other(coarsest) if is_traced() else F.max_pool2d(coarsest, kernel_size=1, stride=2))
        return levels

    def _lateral(self, features: Sequence[Tensor], level: int) -> Tensor:
        return self.inner_norms[level](convolve_by_pixel(cast(nn.Conv2d, self.inner[level]), features[level]))

    def _smoothed(self, merged: Tensor, level: int) -> Tensor:
        return self.outer_norms[level](self.outer[level](merged))


def _every_other(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H / 2, W / 2], rounded up
    """By index: of a slice, which is not dense, torch.export records how its strides compare with sides."""
    for axis in (2, 3):
        x = x.index_select(axis, torch.arange(0, x.shape[axis], 2, device=x.device))
    return x


def _repeated(coarser: Tensor, finer: Tensor) -> Tensor:  # [B, C, H_l+1, W_l+1] -> [B, C, H_l, W_l]
    """Each cell where the finer level has its own."""
    kind = coarser.device.type
    # Autocast would do this in float32, three passes in place of one.
    under_autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if under_autocast else nullcontext():
        return F.interpolate(coarser, size=finer.shape[-2:], mode="nearest")
