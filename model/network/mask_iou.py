"""Mask Scoring R-CNN (arXiv 1903.00241): how well each mask will overlap the truth.

R RoIs, P of them with a mask to learn, C channels, m side of a mask, 2Q = m.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.losses import RoISamples
from dsg.model.network.rpn import widen
from dsg.model.network.types import Targets

_LOSS_WEIGHT = 0.5
_SIDE = 14  # of the mask head's features
_EPSILON = 1e-7


class MaskIoUHead(nn.Module):
    """Mask features and the predicted mask -> its overlap with the truth, one number a class.

    Four 3x3 convolutions, the last with stride 2, and three fully connected layers.

    Args:
        channels: C.
        width: of the fully connected layers.
        outputs: num_classes + 1.
    """

    def __init__(self, channels: int, width: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + (number == 0), channels, 3, stride=2 if number == 3 else 1, padding=1)
            for number in range(4)
        )
        self.fc1 = nn.Linear(channels * (_SIDE // 2) ** 2, width)
        self.fc2 = nn.Linear(width, width)
        self.predictor = nn.Linear(width, outputs)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Overlap of each RoI's mask, about 0..1, not bounded.

        Args:
            features: Tensor[R, C, Q, Q], what the mask head was given; logits: Tensor[R, 2Q, 2Q] of the RoI's class;
            labels: int64 Tensor[R].

        Returns:
            Tensor[R].
        """
        mask = functional.max_pool2d(logits.sigmoid()[:, None].to(features.dtype), 2)  # [R, 1, Q, Q]
        hidden = torch.cat([features, mask], dim=1)  # [R, C + 1, Q, Q]
        for conv in self.convs:
            hidden = functional.relu(conv(hidden), inplace=True)  # in the end [R, C, Q / 2, Q / 2]
        hidden = functional.relu(self.fc1(hidden.flatten(1)))
        overlaps = self.predictor(functional.relu(self.fc2(hidden)))  # [R, num_classes + 1]
        return overlaps.gather(1, labels[:, None]).squeeze(1)


def mask_iou_loss(
    foretold: Tensor,  # [P]
    logits: Tensor,  # [P, m, m]
    wanted: Tensor,  # [P, m, m] in 0..1
    samples: RoISamples,
    rows: Tensor,  # int64 [P] into the samples
    targets: Targets,
) -> Tensor:
    """Squared error against the overlap of each mask with the whole instance, inside the RoI and out of it."""
    true = _overlaps(logits.detach(), wanted, samples, rows, targets)
    counted = true > 0
    error = (widen(foretold) - true).square() * counted
    return _LOSS_WEIGHT * error.sum() / counted.sum().clamp(min=1)


def _overlaps(logits: Tensor, wanted: Tensor, samples: RoISamples, rows: Tensor, targets: Targets) -> Tensor:
    images, truth = samples.images[rows], samples.truth[rows]
    pixels = wanted.new_zeros(len(rows))  # of the whole instance
    for image, masks in enumerate(targets.masks):
        mine = images == image
        pixels[mine] = masks.sum(dim=(1, 2)).to(pixels.dtype)[truth[mine]]
    boxes = samples.rois[rows, 1:]  # [P, 4]
    cells = wanted.shape[-1] ** 2
    box_pixels = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=_EPSILON)
    found, inside = widen(logits) > 0, wanted >= 0.5
    shared = (found & inside).sum(dim=(1, 2))
    instance = torch.maximum(pixels * cells / box_pixels, inside.sum(dim=(1, 2)).to(pixels.dtype))
    return shared / (found.sum(dim=(1, 2)) + instance - shared).clamp(min=_EPSILON)
