"""Batch normalisation that never changes: a detector's batches are too small to measure statistics on.

Letters: B images, C channels, H and W height and width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm2d(nn.Module):
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
        scale = self.weight * (self.running_var + self.eps).rsqrt()  # [C]
        shift = self.bias - self.running_mean * scale  # [C]
        per_channel = (1, -1, 1, 1)
        return torch.addcmul(shift.to(x.dtype).view(per_channel), x, scale.to(x.dtype).view(per_channel))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
