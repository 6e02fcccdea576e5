"""Depthwise convolutions at test time on a GPU: norm and both ReLU6 ride on them, and pictures may have any size.

Training, CPUs and exported files run the same layers one after another.

B images, C channels, H and W height and width, k side of a kernel.
"""

import torch
from torch import Tensor, nn

from dsg.model.network.norm import FrozenBatchNorm2d, folded
from dsg.model.network.tracing import is_traced
from dsg.ops._load import loaded_kernels

_SIDES = (3, 5)
_STRIDES = (1, 2)
_WIDTH = 8  # channels that the kernel reads at a time; in float32 half as many


def has_kernel(convolution: nn.Conv2d, x: Tensor) -> bool:
    """Whether `depthwise_relu6` can take a convolution and its input [B, C, H, W]."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and x.numel() > 0
        and x.shape[1] % _WIDTH == 0
        and not torch.compiler.is_compiling()
        and not is_traced()
        and not (torch.is_grad_enabled() and (x.requires_grad or convolution.weight.requires_grad))
        and x.is_contiguous(memory_format=torch.channels_last)
        and convolution.groups == convolution.in_channels == convolution.out_channels
        and convolution.kernel_size[0] in _SIDES
        and convolution.stride[0] in _STRIDES
        and "cuda" in loaded_kernels()
    )


def depthwise_relu6(convolution: nn.Conv2d, norm: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """relu6(norm(convolution(relu6(x)))), computed in float32.

    Args:
        convolution: square, padded by k // 2.
        norm: a `FrozenBatchNorm2d` of C channels, or what `fold_norms` left in its place.
        x: Tensor[B, C, H, W], channels-last.
        dtype: of the result: that of `x`, or half precision where that is float32.

    Returns:
        Tensor[B, C, H / stride, W / stride], sides rounded up.
    """
    if isinstance(norm, FrozenBatchNorm2d):
        weight, bias = folded(convolution, norm)  # [C, 1, k, k], [C]
    else:
        weight, bias = convolution.weight, convolution.get_parameter("bias")
    stride, (batch, channels, height, width) = convolution.stride[0], x.shape
    out = torch.empty(
        (batch, channels, -(-height // stride), -(-width // stride)),
        dtype=dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    by_tap = weight.float().flatten(1).t().contiguous()  # [k * k, C]: neighbouring channels together, as in `x`
    torch.ops.dsg.depthwise_relu6(x, by_tap, bias.float().contiguous(), convolution.kernel_size[0], stride, out)
    return out
