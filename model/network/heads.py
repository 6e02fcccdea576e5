"""Heads on RoI features: boxes, masks, and the fusion of mask features into both.

R RoIs, C channels of the pyramid, P side of the pooled features.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.fused import (
    add_pooled,
    by_pixel,
    convolve_relu,
    fits,
    fused_convolution,
    is_fused,
    linear_relu,
)
from dsg.model.network.norm import HeadNorm
from dsg.model.network.tracing import is_traced

# RoIs that a mask head works on at once at test time: its largest tensor is 4 * C * P * P numbers a RoI. A GPU is fed
# as much as its memory allows; on a CPU small tensors stay in the caches, and their memory is used again instead of
# being asked of the system each time, which takes as long as the deconvolution.
_ROIS_AT_ONCE = 1024
_ROIS_AT_ONCE_CPU = 32


class BoxHead(nn.Module):
    """Two fully connected layers, then class logits and box offsets of each class (background is class 0).

    Args:
        channels: C.
        pool: P.
        width: of the hidden layers.
        outputs: num_classes + 1.
        per_class: offsets of each class; False: of the box, whatever it holds, as cascades have them.
    """

    def __init__(self, channels: int, pool: int, width: int, outputs: int, per_class: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * pool * pool, width)
        self.fc2 = nn.Linear(width, width)
        self.classifier = nn.Linear(width, outputs)
        self.regressor = nn.Linear(width, (outputs if per_class else 1) * 4)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.classifier, 0.01), (self.regressor, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs.

        Args:
            features: Tensor[R, C, P, P].

        Returns:
            class logits [R, num_classes + 1] and deltas [R, num_classes + 1, 4], or [R, 1, 4] for all classes.
        """
        if is_fused(features):
            # The weights are turned to the order of channels-last features: they are fewer than the features.
            by_place = (
                self.fc1.weight.unflatten(1, features.shape[1:]).permute(0, 2, 3, 1).flatten(1)
            )  # [width, P * P * C]
            hidden = linear_relu(features.permute(0, 2, 3, 1).flatten(1), by_place, self.fc1.bias)  # [R, width]
            hidden = linear_relu(hidden, self.fc2.weight, self.fc2.bias)  # [R, width]
        else:
            hidden = functional.relu(self.fc1(features.flatten(1)))  # [R, C * P * P] -> [R, width]
            hidden = functional.relu(self.fc2(hidden))  # [R, width]
        return self.classifier(hidden), self.regressor(hidden).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a deconvolution, a 1x1 convolution: mask logits of twice the pooled size.

    With one output it is the mask proposal network (MPN, paper section 3.2); with num_classes + 1 Mask R-CNN's head.

    Args:
        channels: C.
        outputs: masks a RoI.
        normalised: batch norm after each of the four, in place of their biases.
    """

    def __init__(self, channels: int, outputs: int, normalised: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=not normalised) for _ in range(4))
        self.norms = nn.ModuleList(HeadNorm(channels) if normalised else nn.Identity() for _ in range(4))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, outputs, 1)
        for layer in (*self.convs, self.deconv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        # Small, so that the loss starts near log 2 whatever the scale of a backbone's features.
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.get_parameter("bias"))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw outputs.

        Args:
            features: Tensor[R, C, P, P].
            labels: int64 Tensor[R]: the class whose mask is wanted of each RoI (all the same to a head with one
                output). None is all masks.

        Returns:
            mask logits [R, outputs, 2P, 2P], with labels [R, 1, 2P, 2P], and the features after the fourth
            convolution [R, C, P, P] (F_- of the paper).
        """
        if self.training or is_traced():  # an exported graph would hold the layers once for each part
            return self._run(features, labels)
        if is_fused(features):
            hidden = self.hidden(features)
            parts = zip(hidden.split(_ROIS_AT_ONCE), _split(labels, hidden, _ROIS_AT_ONCE), strict=True)
            return torch.cat([self._fused_masks(*part) for part in parts]), hidden
        small_parts = features.device.type == "cpu" and not torch.compiler.is_compiling()
        at_once = _ROIS_AT_ONCE_CPU if small_parts else _ROIS_AT_ONCE
        if features.shape[0] <= at_once:
            return self._run(features, labels)
        results = [
            self._run(*part) for part in zip(features.split(at_once), _split(labels, features, at_once), strict=True)
        ]
        return torch.cat([logits for logits, _ in results]), torch.cat([hidden for _, hidden in results])

    def hidden(self, features: Tensor) -> Tensor:  # [R, C, P, P] -> [R, C, P, P]
        """The four convolutions alone: F_- of the paper, what HTC hands from one mask head to the next."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if isinstance(norm, nn.Identity):
                features = convolve_relu(cast(nn.Conv2d, conv), features)
            else:
                features = functional.relu(norm(conv(features)), inplace=True)
        return features

    def upscaled(self, hidden: Tensor) -> Tensor:  # [R, C, P, P] -> [R, C, 2P, 2P]
        """What the masks of every class are read from."""
        return functional.relu(self.deconv(hidden), inplace=True)

    def channels(self, labels: Tensor) -> Tensor:  # int64 [R] -> int64 [R]
        """Which output holds each RoI's mask."""
        return labels if self.predictor.out_channels > 1 else torch.zeros_like(labels)

    def masks_of(self, upscaled: Tensor, labels: Tensor) -> Tensor:  # [R, C, 2P, 2P], int64 [R] -> [R, 1, 2P, 2P]
        """The 1x1 convolution for one output of each RoI: 1 / outputs of the work."""
        if self.predictor.out_channels == 1:
            only: Tensor = self.predictor(upscaled)
            return only
        assert self.predictor.bias is not None
        weights = self.predictor.weight.flatten(1)[labels]  # [R, C]
        biases = self.predictor.bias[labels]  # [R]
        logits = weights[:, None] @ upscaled.flatten(2) + biases[:, None, None]  # [R, 1, 2P * 2P]
        return logits.unflatten(2, upscaled.shape[-2:])

    def _fused_masks(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        """Deconvolution and 1x1 convolution as products of matrices: each cell becomes two by two of its own.

        hidden [R, C, P, P], labels int64 [R] or None -> [R, 1 or outputs, 2P, 2P]
        """
        count, channels, height, width = hidden.shape
        weight = self.deconv.weight.permute(2, 3, 1, 0).reshape(-1, channels)  # [2 * 2 * C, C]
        assert self.deconv.bias is not None and self.predictor.bias is not None
        upscaled = linear_relu(by_pixel(hidden), weight, self.deconv.bias.repeat(4))  # [R * P * P, 2 * 2 * C]
        if labels is None or self.predictor.out_channels == 1:
            logits = functional.linear(
                upscaled.view(-1, channels), self.predictor.weight.flatten(1), self.predictor.bias
            )
        else:
            own = self.predictor.weight.flatten(1)[labels][..., None]  # [R, C, 1]
            logits = (
                upscaled.view(count, 4 * height * width, channels) @ own + self.predictor.bias[labels][:, None, None]
            )
        outputs = logits.shape[-1]
        by_quarter = logits.view(count, height, width, 2, 2, outputs)
        return by_quarter.permute(0, 5, 1, 3, 2, 4).reshape(count, outputs, 2 * height, 2 * width)

    def _run(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(features)  # [R, C, P, P]
        if is_fused(hidden):
            return self._fused_masks(hidden, labels), hidden
        upscaled = self.upscaled(hidden)  # [R, C, 2P, 2P]
        return self.predictor(upscaled) if labels is None else self.masks_of(upscaled, labels), hidden


class Fusion(nn.Module):
    """Adds mask proposal features to the features of another head (paper section 3.3).

    The text says a 1x1 convolution; only 3x3 gives the sizes of Table 1. Features are pooled after the convolution
    when the other head's are smaller.

    Args:
        channels: C.
        kernel: 3 or 1.
        activation: ReLU after the convolution.
    """

    def __init__(self, channels: int, kernel: int, activation: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.activation = activation
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        nn.init.zeros_(self.conv.get_parameter("bias"))

    def forward(self, features: Tensor, mask_features: Tensor) -> Tensor:
        """features + pooled(convolved(mask_features)).

        Args:
            features: Tensor[R, C, P, P]; mask_features: Tensor[R, C, Q, Q], Q >= P.

        Returns:
            Tensor[R, C, P, P].
        """
        added = self._convolved(mask_features)  # [R, C, Q, Q]
        height, width = features.shape[-2:]
        if added.shape[-2:] != (height, width):
            step = added.shape[-1] // width
            if (step * height, step * width) == tuple(added.shape[-2:]):
                return add_pooled(features, added, step)  # as below, and many times quicker there and back
            added = functional.adaptive_avg_pool2d(added, (height, width))  # [R, C, P, P]
        return features + added

    def _convolved(self, mask_features: Tensor) -> Tensor:  # [R, C, Q, Q] -> [R, C, Q, Q]
        if not self.activation:
            return cast(Tensor, self.conv(mask_features))
        if not self.training:
            return convolve_relu(self.conv, mask_features)
        # In training the gradient at 0 is 1: relu's own is 0 there, and a convolution that starts at zero (see
        # `guided_start`) would stay what it is for good.
        if not fits(self.conv, mask_features):
            added = self.conv(mask_features)
            return cast(Tensor, added.masked_fill(added < 0, 0))
        # A fused kernel has relu's own gradient; there a bias of next to nothing does the same.
        weight, bias = self.conv.weight, self.conv.get_parameter("bias")
        at_zero = (weight == 0).all().to(bias.dtype) * torch.finfo(mask_features.dtype).tiny
        return fused_convolution(self.conv, mask_features, weight, bias + at_zero, None)


def _split(labels: Tensor | None, beside: Tensor, size: int) -> Sequence[Tensor | None]:
    """Labels in the parts that `beside.split(size)` has, or as many times none."""
    return [None] * len(beside.split(size)) if labels is None else labels.split(size)
