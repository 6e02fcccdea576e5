"""Deformable convolutions, version 1 (arXiv 1703.06211) and 2 (arXiv 1811.11168). B images, C channels."""

import math

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

_POINTS = 9  # sampling points of a 3x3 kernel


class DeformableConv(nn.Module):
    """A 3x3 convolution that learns where to look: each sampling point is moved, and weighted if modulated.

    The offsets come from a 3x3 convolution that starts at zero, so that a fresh one is a plain convolution (with
    modulation: half of one). `weight` has the name and shape of a plain convolution's, so that its trained weights fit.

    Args:
        in_channels, out_channels: C before and after.
        stride: 1 or 2.
        groups: of the convolution itself; all channels share one set of offsets.
        modulated: version 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, modulated: bool) -> None:
        super().__init__()
        self.stride = stride
        self.modulated = modulated
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, 3, 3))
        self.offset = nn.Conv2d(in_channels, (3 if modulated else 2) * _POINTS, 3, stride=stride, padding=1)
        nn.init.normal_(self.weight, std=math.sqrt(2 / (out_channels * _POINTS / groups)))
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]
        """The convolution at the places that `x` itself asks for."""
        moved = self.offset(x)  # [B, 18 or 27, H / stride, W / stride]
        offsets = moved[:, : 2 * _POINTS]  # (y, x) of each point in turn, feature pixels
        weights = moved[:, 2 * _POINTS :].sigmoid() if self.modulated else None
        convolved: Tensor = deform_conv2d(
            x, offsets, self.weight.to(x.dtype), stride=self.stride, padding=1, mask=weights
        )
        return convolved
