"""Layers in one kernel each where a GPU computes in half precision: bias and ReLU ride on the convolution.

Without this each of them is a pass over the whole feature map, and passes take a GPU longer than the products do. In
training their gradients are written here too, since torch has none for these kernels. Elsewhere, and while anything is
compiled or exported, the same layers run one after another.

B images, R RoIs, C channels, H and W height and width.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from dsg.model.network.tracing import is_traced
from dsg.model.network.whole import HALF_PRECISION
from dsg.ops._load import loaded_kernels

_WIDTH = 8  # tensor cores read this many channels of half precision at a time


def is_fused(x: Tensor) -> bool:
    """Whether layers on `x` [B, C, H, W] are to be fused: half precision, channels-last, on a GPU."""
    return (
        x.is_cuda
        and x.dtype in HALF_PRECISION
        and not torch.compiler.is_compiling()
        and not is_traced()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def convolve_relu(convolution: nn.Conv2d, x: Tensor, other: Tensor | None = None) -> Tensor:
    """relu(convolution(x) + other) of x [B, C_in, H, W]; `other` has the shape of the result, None is nothing."""
    if fits(convolution, x, other) and convolution.bias is not None:
        return fused_convolution(convolution, x, convolution.weight, convolution.bias, other)
    out = convolution(x)
    if other is not None:
        out += other
    return functional.relu(out, inplace=True)


def fits(convolution: nn.Conv2d, x: Tensor, other: Tensor | None = None) -> bool:
    """Whether `fused_convolution` can take a convolution, its input [B, C_in, H, W], and what is added."""
    return (
        is_fused(x)
        and (other is None or is_fused(other))
        and x.numel() > 0
        and convolution.groups == 1
        and not isinstance(convolution.padding, str)
        and convolution.in_channels % _WIDTH == 0
        and convolution.out_channels % _WIDTH == 0
    )


def fused_convolution(convolution: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None) -> Tensor:
    """relu(convolution(x) + other) with another weight and bias in one kernel; other is None for none."""
    shape = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    result: Tensor = _ConvolveReLU.apply(x, weight, bias, other, shape)
    return result


def convolve_by_pixel(convolution: nn.Conv2d, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H, W]
    """convolution(x) of a 1x1 convolution with bias: as a product of matrices, whose end adds the bias."""
    if not fits(convolution, x):
        return cast(Tensor, convolution(x))
    batch, _, height, width = x.shape
    rows = functional.linear(by_pixel(x), convolution.weight.flatten(1), convolution.bias)  # [B * H * W, C]
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [R, C_in], [C, C_in], [C] -> [R, C]
    """relu(x @ weight.T + bias)."""
    result: Tensor = _LinearReLU.apply(x, weight, bias)
    return result


def average_pool(x: Tensor, step: int) -> Tensor:  # [R, C, P, P] -> [R, C, P / step, P / step]
    """The mean of each step x step cells."""
    if not is_fused(x):
        return functional.avg_pool2d(x, step)
    result: Tensor = _AveragePool.apply(x, step)
    return result


def add_pooled(x: Tensor, finer: Tensor, step: int) -> Tensor:
    """x [R, C, P, P] plus the mean of each step x step cells of `finer` [R, C, step * P, step * P]."""
    if (
        is_fused(x)
        and is_fused(finer)
        and x.shape[1] % _WIDTH == 0
        and not (torch.is_grad_enabled() and (x.requires_grad or finer.requires_grad))
        and "cuda" in loaded_kernels()
    ):
        out = torch.empty_like(x)
        torch.ops.dsg.add_pooled(x, finer, step, out)
        return out
    return x + average_pool(finer, step)


class _ConvolveReLU(torch.autograd.Function):
    """cuDNN's convolution with bias, another tensor and ReLU in its epilogue; weights may be wider than `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, shape: Any) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        out: Tensor
        if other is None:
            out = torch.cudnn_convolution_relu(x, weight, bias, *shape)
        else:
            out = torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *shape)
        ctx.save_for_backward(x, weight, out)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x, of_weight, of_bias, of_other, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        stride, padding, dilation, groups = ctx.shape  # type: ignore[attr-defined]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        wanted = [of_x, of_weight, of_bias]
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return (*grads, grad if of_other else None, None)


class _LinearReLU(torch.autograd.Function):
    """cuBLAS's product with bias and ReLU in its epilogue; weights may be wider than `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        out: Tensor = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x, of_weight, of_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        return (
            grad @ weight if of_x else None,
            grad.t() @ x if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


def by_pixel(x: Tensor) -> Tensor:  # [B, C, H, W] channels-last -> [B * H * W, C]
    """The features of each pixel as a row; no copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _AveragePool(torch.autograd.Function):
    """torch's, with a gradient that writes each cell once; torch's own takes three times as long on channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: int) -> Tensor:
        ctx.step = step
        return functional.avg_pool2d(x, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        step = ctx.step  # type: ignore[attr-defined]
        share = grad.contiguous(memory_format=torch.channels_last) / step**2
        height, width = share.shape[-2:]
        return functional.interpolate(share, (height * step, width * step), mode="nearest"), None
