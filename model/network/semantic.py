"""Semantic branch of Hybrid Task Cascade (arXiv 1901.07518, section 3.3): a map of the whole picture, whose features
are added to those of every RoI.

B images, R RoIs, C channels, S classes of the map, G padded instances of an image; h, w size of the map, an eighth of
the padded picture.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.rpn import widen
from dsg.model.network.types import Targets
from dsg.ops import sg_roi_align

STRIDE = 8
IGNORED = 255
"""Value in a map that no loss is made of."""
_LEVEL = 1  # the pyramid level of that stride


class SemanticBranch(nn.Module):
    """All pyramid levels at stride 8, summed, and four 3x3 convolutions; then the map, and features for RoIs.

    Args:
        channels: C.
        outputs: S.
        levels: of the pyramid.
        side: of the RoI features that masks get; boxes get them averaged to their own size.
        sampling_ratio, aligned: of the RoI features, as in `sg_roi_align`.
    """

    def __init__(self, channels: int, outputs: int, levels: int, side: int, sampling_ratio: int, aligned: bool) -> None:
        super().__init__()
        self.side = side
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.laterals = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(levels))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.embedding = nn.Conv2d(channels, channels, 1)
        self.classifier = nn.Conv2d(channels, outputs, 1)
        for layer in (*self.laterals, *self.convs, self.embedding, self.classifier):
            nn.init.kaiming_normal_(layer.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features for RoIs [B, C, h, w], and what `logits` reads [B, C, h, w].

        Args:
            levels: Tensor[B, C, H_l, W_l] each, finest first.
        """
        size = levels[_LEVEL].shape[-2:]
        hidden = functional.relu(self.laterals[_LEVEL](levels[_LEVEL]))  # [B, C, h, w]
        for number, (level, lateral) in enumerate(zip(levels, self.laterals, strict=True)):
            if number != _LEVEL:
                resized = functional.interpolate(level, size=size, mode="bilinear", align_corners=True)
                hidden = hidden + functional.relu(lateral(resized))
        for conv in self.convs:
            hidden = functional.relu(conv(hidden))
        return functional.relu(self.embedding(hidden)), hidden

    def logits(self, hidden: Tensor) -> Tensor:  # [B, C, h, w] -> [B, S, h, w]
        """The map."""
        mapped: Tensor = self.classifier(hidden)
        return mapped

    def roi_features(self, features: Tensor, rois: Tensor) -> Tensor:  # [B, C, h, w], [R, 5] -> [R, C, side, side]
        """What is added to the RoIs' own features."""
        return sg_roi_align(features, rois, None, self.side, 1 / STRIDE, self.sampling_ratio, self.aligned)


def semantic_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy, mean over the cells that are not ignored; a zero with a gradient where all are.

    Args:
        logits: Tensor[B, S, h, w]; wanted: int64 Tensor[B, h, w] in 0..S - 1, or `IGNORED`.
    """
    total = functional.cross_entropy(widen(logits), wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def map_of_data(targets: Targets, size: tuple[int, int], classes: int) -> Tensor:
    """The data's own maps, every eighth pixel.

    Args:
        size: (h, w); classes: S, larger values are ignored.

    Returns:
        int64 Tensor[B, h, w], `IGNORED` in the padding.

    Raises:
        ValueError: the targets have no maps.
    """
    if targets.semantic is None:
        raise ValueError(
            "semantic='stuff' learns from maps that come with the data, and targets lack `semantic`;"
            " use semantic='instances'"
        )
    wanted = torch.full((len(targets.semantic), *size), IGNORED, device=targets.boxes.device)
    for own, place in zip(targets.semantic, wanted, strict=True):
        cells = own[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        place[: cells.shape[0], : cells.shape[1]] = cells
    return wanted.masked_fill(wanted >= classes, IGNORED)


@torch.no_grad()
def map_of_instances(targets: Targets, sizes: Tensor, size: tuple[int, int]) -> Tensor:
    """Instances painted into a map, the smaller over the larger: for data without stuff.

    Background is 0; what nobody knows (crowd regions, boxes without a mask, padding) is ignored.

    Args:
        sizes: int64 Tensor[B, 2], (height, width) of each picture; size: (h, w).

    Returns:
        int64 Tensor[B, h, w] in 0..num_classes, or `IGNORED`.
    """
    device = targets.boxes.device
    y = torch.arange(size[0], device=device) * STRIDE + STRIDE // 2  # pixels that are looked at
    x = torch.arange(size[1], device=device) * STRIDE + STRIDE // 2
    maps = []
    for image, masks in enumerate(targets.masks):
        inside = (y < sizes[image, 0])[:, None] & (x < sizes[image, 1])  # [h, w]
        unknown = torch.cat(
            [targets.ignore_boxes[image], targets.boxes[image][targets.valid[image] & ~targets.has_mask[image]]]
        )  # [I, 4]
        rows = (y + 0.5 >= unknown[:, 1, None]) & (y + 0.5 < unknown[:, 3, None])  # [I, h]
        columns = (x + 0.5 >= unknown[:, 0, None]) & (x + 0.5 < unknown[:, 2, None])  # [I, w]
        ignored = ~inside | (rows[:, :, None] & columns[:, None]).any(dim=0)
        wanted = torch.zeros(size, dtype=torch.int64, device=device).masked_fill(ignored, IGNORED)
        if len(masks):
            cells = masks[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].bool()  # [n, <= h, <= w]
            smallness = 1 / masks.flatten(1).sum(dim=1).clamp(min=1)  # [n]
            best, index = (cells * smallness[:, None, None]).max(dim=0)
            corner = wanted[: cells.shape[1], : cells.shape[2]]
            corner.copy_(targets.labels[image, index].where(best > 0, corner))
        maps.append(wanted)
    return torch.stack(maps)
