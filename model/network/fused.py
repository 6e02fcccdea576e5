"""Layers in one kernel each where a GPU computes in half precision at test time: bias and ReLU ride on the convolution.

Without this each of them is a pass over the whole feature map, and passes take a GPU longer than the products do.
Elsewhere, and while anything is differentiated, compiled or exported, the same layers run one after another.

B images, R RoIs, C channels, H and W height and width.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.tracing import is_traced

_WIDTH = 8  # tensor cores read this many channels of half precision at a time


def is_fused(x: Tensor) -> bool:
    """Whether layers on `x` [B, C, H, W] are to be fused: half precision, channels-last, on a GPU, for good."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_traced()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def convolve_relu(convolution: nn.Conv2d, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, ...]
    """relu(convolution(x))."""
    if not _fits(convolution, x):
        return functional.relu(convolution(x), inplace=True)
    one, padding = convolution, cast(tuple[int, ...], convolution.padding)
    result: Tensor = torch.cudnn_convolution_relu(
        x, one.weight, one.bias, one.stride, padding, one.dilation, one.groups
    )
    return result


def convolve_add_relu(convolution: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
    """relu(convolution(x) + other); `other` has the shape of the result."""
    if not _fits(convolution, x) or not other.is_contiguous(memory_format=torch.channels_last):
        out = convolution(x)
        out += other
        return functional.relu(out, inplace=True)
    one, padding = convolution, cast(tuple[int, ...], convolution.padding)
    result: Tensor = torch.cudnn_convolution_add_relu(
        x, one.weight, other, 1.0, one.bias, one.stride, padding, one.dilation, one.groups
    )
    return result


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [R, C_in], [C, C_in], [C] -> [R, C]
    """relu(x @ weight.T + bias)."""
    result: Tensor = torch._addmm_activation(bias, x, weight.t())
    return result


def by_pixel(x: Tensor) -> Tensor:  # [B, C, H, W] channels-last -> [B * H * W, C]
    """The features of each pixel as a row; no copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _fits(convolution: nn.Conv2d, x: Tensor) -> bool:
    return (
        is_fused(x)
        and x.numel() > 0
        and convolution.bias is not None
        and convolution.groups == 1
        and not isinstance(convolution.padding, str)
        and convolution.in_channels % _WIDTH == 0
        and convolution.out_channels % _WIDTH == 0
    )
