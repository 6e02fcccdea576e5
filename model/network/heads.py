"""Heads on RoI features: boxes, masks, and the fusion of mask features into both.

R RoIs, C channels of the pyramid, P side of the pooled features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        small_parts = features.device.type == "cpu" and not torch.compiler.is_compiling()
        at_once = _ROIS_AT_ONCE_CPU if small_parts else _ROIS_AT_ONCE
        if features.shape[0] <= at_once:
            return self._run(features, labels)
        parts = features.split(at_once)
        part_labels = [None] * len(parts) if labels is None else labels.split(at_once)
        results = [self._run(*part) for part in zip(parts, part_labels, strict=True)]
        return torch.cat([logits for logits, _ in results]), torch.cat([hidden for _, hidden in results])

    def hidden(self, features: Tensor) -> Tensor:  # [R, C, P, P] -> [R, C, P, P]
        """The four convolutions alone: F_- of the paper, what HTC hands from one mask head to the next."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
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

    def _run(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(features)  # [R, C, P, P]
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
        added = self.conv(mask_features)  # [R, C, Q, Q]
        if self.activation:
            # In training the gradient at 0 is 1: relu's own is 0 there, and a convolution that starts at zero (see
            # `guided_start`) would stay what it is for good.
            added = added.masked_fill(added < 0, 0) if self.training else functional.relu(added)
        height, width = features.shape[-2:]
        if added.shape[-2:] != (height, width):
            added = functional.adaptive_avg_pool2d(added, (height, width))  # [R, C, P, P]
        return features + added
