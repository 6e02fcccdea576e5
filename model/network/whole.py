"""What stays float32 when the network around it is cast to half precision.

Rounding a weight moves what a convolution gives, and where hundreds of weights are summed these moves cancel out. A
depthwise convolution sums nine or twenty-five. On the network of the package its rounded weights moved the features of
the pyramid further than all other rounding together, and with them one detection in a hundred.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

HALF_PRECISION = (torch.float16, torch.bfloat16)


class Whole(nn.Module):
    """A module whose own parameters and buffers `half()`, `bfloat16()` and `to(dtype)` leave as wide as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = {name: tensor.detach() for name, tensor in self._own()}
        super()._apply(fn, recurse)
        for name, tensor in self._own():
            if tensor.dtype in HALF_PRECISION and own[name].dtype not in HALF_PRECISION:
                tensor.data = own[name].to(tensor.device)
        return self

    def _own(self) -> list[tuple[str, Tensor]]:
        return [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]


class WholeConv2d(Whole, nn.Conv2d):
    """A convolution that computes in float32 in a network in half precision; its caller casts what goes in and out."""
