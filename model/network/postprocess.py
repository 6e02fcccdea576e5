"""From the box head's raw outputs to the boxes that are kept.

B images, K proposals of an image, C classes without background, N candidates of an image, D detections of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsg.model.network.boxes import clip_boxes, decode_deltas, has_sides, non_maximum_suppression
from dsg.model.network.config import DetectorConfig
from dsg.model.network.rpn import widen
from dsg.model.network.types import Proposals


@dataclass(frozen=True)
class KeptBoxes:
    """Detections before their masks, best first."""

    boxes: Tensor  # [B, D, 4], zeros where not valid
    scores: Tensor  # [B, D] in 0..1, zeros where not valid
    labels: Tensor  # int64 [B, D] in 1..num_classes, 0 where not valid
    origin: Tensor  # int64 [B, D]: the row of B * K each came from
    valid: Tensor  # bool [B, D]


def select_boxes(
    logits: Tensor,  # [B * K, C + 1]
    deltas: Tensor,  # [B * K, C + 1, 4]
    proposals: Proposals,  # K an image
    sizes: Tensor,  # int64 [B, 2] (height, width)
    config: DetectorConfig,
) -> KeptBoxes:
    """Score floor, the best candidates, offsets of their class, NMS within each class, the best that are left."""
    batch, count = proposals.valid.shape
    probabilities = widen(logits).softmax(dim=1)[:, 1:].unflatten(0, (batch, count))  # [B, K, C]
    classes = probabilities.shape[2]
    usable = proposals.valid[..., None] & (probabilities > config.score_threshold)
    ranked = probabilities.where(usable, torch.full_like(probabilities, -1.0)).flatten(1)  # [B, K * C]
    scores, pair = ranked.topk(min(config.nms_candidates, count * classes), dim=1)  # [B, N]
    origin, label = pair // classes, pair % classes + 1  # [B, N]
    # Offsets are decoded for the candidates alone: K * C boxes would be 24,000 an image, nearly all of them unused.
    row = origin + torch.arange(batch, device=origin.device)[:, None] * count  # [B, N] into B * K
    offsets = widen(deltas)[row, label]  # [B, N, 4]
    starts = proposals.boxes.gather(1, origin[..., None].expand(-1, -1, 4))  # [B, N, 4]
    boxes = clip_boxes(decode_deltas(offsets, starts, config.box_delta_weights), sizes)
    valid = (scores >= 0) & has_sides(boxes, config.min_box_size)
    index, kept = non_maximum_suppression(boxes, scores, label, valid, config.nms_iou, config.max_detections)
    return KeptBoxes(
        boxes=boxes.gather(1, index[..., None].expand(-1, -1, 4)).masked_fill(~kept[..., None], 0.0),
        scores=scores.gather(1, index).masked_fill(~kept, 0.0),
        labels=label.gather(1, index).masked_fill(~kept, 0),
        origin=row.gather(1, index),
        valid=kept,
    )
