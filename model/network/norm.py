"""Batch normalisation that never changes, since a detector's batches are too small to measure statistics on; and one
that does, for heads, which see hundreds of RoIs.

Letters: B images, C channels, H and W height and width.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsg.model.network.fused import convolve_relu, fits, fused_convolution
from dsg.model.network.whole import Whole


class FrozenBatchNorm2d(Whole):
    """`BatchNorm2d` in eval mode, for good: a fixed scale and shift of each channel.

    `weight`, `bias`, `running_mean` and `running_var` (each `[C]`) are buffers: no optimizer sees them, no
    parameter count includes them, and `train()` changes nothing. State dicts of `BatchNorm2d` load as they
    are; the counter `num_batches_tracked` is dropped where a file has it.

    Args:
        channels: C.
        eps: added to the variance. It belongs to the weights: 1e-5 for ResNets, 1e-3 for EfficientNet-Lite.
    """

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        """Normalise; the result has the dtype and memory format of `x`, also where `x` is half precision
        (under autocast) and the buffers are float32."""
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        # F.batch_norm would keep x for gradients of weight and bias that nobody wants, a second copy of
        # every feature map in a training step. addcmul keeps the scale alone and is one kernel too. Scale
        # and shift are worked out in the buffers' precision and rounded once.
        scale, shift = self.scale_and_shift()
        per_channel = (1, -1, 1, 1)
        return torch.addcmul(shift.to(x.dtype).view(per_channel), x, scale.to(x.dtype).view(per_channel))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as `x * scale + shift`: both [C], in the dtype of the buffers."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()  # [C]
        return scale, self.bias - self.running_mean * scale

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class HeadNorm(nn.BatchNorm2d):
    """`BatchNorm2d` that a step without a single RoI leaves as it was: nothing cannot be averaged."""

    def forward(self, x: Tensor) -> Tensor:  # [R, C, H, W] -> [R, C, H, W]
        """Normalise by the statistics of `x` in training, by the running ones otherwise or where R is 0."""
        if self.training and x.shape[0] == 0:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        normalised: Tensor = super().forward(x)
        return normalised


def folded(convolution: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [C, C_in / groups, k, k] and bias [C] of the one convolution that is a convolution without bias and then
    its norm."""
    scale, shift = norm.scale_and_shift()
    return convolution.weight * scale.view(-1, 1, 1, 1), shift


def convolve_and_normalise(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(convolution(x))`; at test time on a CPU by one convolution with scaled weights.

    That spares a pass over every feature map, which takes a CPU longer than the scaling of the weights each time.
    On a GPU it is the other way round, and an exported graph keeps the layers as they are for its own optimizer.

    Args:
        convolution: [B, C_in, H, W] -> [B, C, ...], without bias, zeros as padding.
        norm: a `FrozenBatchNorm2d` of C channels, or what `fold_norms` left in its place.
        x: Tensor[B, C_in, H, W].
    """
    in_one = x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if not in_one or not isinstance(norm, FrozenBatchNorm2d):
        normalised: Tensor = norm(convolution(x))
        return normalised
    weight, bias = folded(convolution, norm)
    return F.conv2d(
        x,
        weight.to(x.dtype),
        bias.to(x.dtype),
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
    )


def convolve_normalise_relu(convolution: nn.Conv2d, norm: nn.Module, x: Tensor, other: Tensor | None = None) -> Tensor:
    """`relu(norm(convolution(x)))`, with `other`, of the result's shape, added before the ReLU; arguments as above."""
    if isinstance(norm, nn.Identity):
        return convolve_relu(convolution, x, other)
    if isinstance(norm, FrozenBatchNorm2d) and fits(convolution, x, other):
        return fused_convolution(convolution, x, *folded(convolution, norm), other)
    out = convolve_and_normalise(convolution, norm, x)
    if other is not None:
        out += other
    return F.relu(out, inplace=True)


def fold_norms(module: nn.Module) -> None:
    """Put every frozen norm into the convolution before it, in place, for a network that is trained no more.

    A norm belongs to the module that its parent registered just before it, where that is a convolution without bias.
    """
    for parent in module.modules():
        children = list(parent.named_children())
        for (_, convolution), (name, norm) in itertools.pairwise(children):
            if not isinstance(norm, FrozenBatchNorm2d):
                continue
            if not isinstance(convolution, nn.Conv2d) or convolution.bias is not None:
                continue
            if convolution.out_channels != norm.weight.numel():
                continue
            dtype = convolution.weight.dtype
            weight, bias = folded(convolution, norm)
            convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            convolution.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
            setattr(parent, name, nn.Identity())
