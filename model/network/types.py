"""What the parts of the network hand to each other.

B images, K padded rows of an image, G padded ground-truth boxes, I padded ignore regions, m side of a mask.
Boxes are (x1, y1, x2, y2) in pixels of the resized picture; padding right and below changes no coordinate.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Proposals:
    """Regions that may hold an instance, best first."""

    boxes: Tensor  # [B, K, 4], zeros where not valid
    scores: Tensor  # [B, K] in 0..1, falling, zeros where not valid
    valid: Tensor  # bool [B, K]


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch."""

    boxes: Tensor  # [B, G, 4]
    labels: Tensor  # int64 [B, G] in 1..num_classes
    valid: Tensor  # bool [B, G]
    has_mask: Tensor  # bool [B, G]: box losses only where False
    ignore_boxes: Tensor  # [B, I, 4]: crowd regions, never positives, never negatives; zeros where there is none
    masks: list[Tensor]  # uint8 or bool [n, H, W] of each image, n <= G, the rows of its boxes
    semantic: list[Tensor] | None = None  # uint8 or int64 [H, W] of each image: its classes, 255 unknown


@dataclass(frozen=True)
class ProposalMasks:
    """What the mask proposal network gives for R RoIs (paper section 3.2)."""

    logits: Tensor  # [R, m, m], class-agnostic
    guidance: Tensor  # [R, m, m] in 0..1: P of the paper
    features: Tensor  # [R, C, P, P]: F_- of the paper

    def rows(self, index: Tensor) -> "ProposalMasks":  # int64 [S] -> S RoIs
        """The RoIs of these rows."""
        return ProposalMasks(self.logits[index], self.guidance[index], self.features[index])


class PaddedDetections(NamedTuple):
    """The network's answer with static shapes, what exported files give; best first."""

    valid: Tensor  # bool [B, K]
    boxes: Tensor  # [B, K, 4]
    scores: Tensor  # [B, K] in 0..1
    labels: Tensor  # int64 [B, K] in 1..num_classes, 0 where not valid
    mask_probs: Tensor  # [B, K, m, m] in 0..1
