"""Region proposal network (Faster R-CNN, section 3.1): its head, and the choice of proposals from its outputs.

B images, A anchors a cell, L levels, N anchors of an image, K proposals of an image.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.boxes import clip_boxes, decode_deltas, has_sides, non_maximum_suppression
from dsg.model.network.fused import by_pixel, convolve_relu, is_fused
from dsg.model.network.tracing import is_traced
from dsg.model.network.types import Proposals
from dsg.model.network.whole import HALF_PRECISION
from dsg.ops.nms import after_all

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class RPNHead(nn.Module):
    """One 3x3 convolution, then objectness and box offsets of each anchor; shared by all levels.

    Args:
        channels: of the pyramid.
        anchors_per_cell: A.
        depth: 3x3 convolutions.
    """

    def __init__(self, channels: int, anchors_per_cell: int, depth: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.further = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth - 1))
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (self.conv, *self.further, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Raw outputs of each level, rows in the order of the anchors (row, column, anchor).

        Args:
            levels: features [B, C, Hf, Wf].

        Returns:
            objectness logits [B, Hf * Wf * A] and deltas [B, Hf * Wf * A, 4] a level, float32 or wider.
        """
        logits, deltas = [], []
        for features in levels:
            hidden = convolve_relu(self.conv, features)  # [B, C, Hf, Wf]
            for conv in self.further:
                hidden = convolve_relu(cast(nn.Conv2d, conv), hidden)
            if is_fused(hidden):
                own_logits, own_deltas = self._by_cell(hidden)
                logits.append(own_logits)
                deltas.append(own_deltas)
                continue
            logits.append(widen(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)))  # [B, Hf * Wf * A]
            by_cell = self.deltas(hidden).permute(0, 2, 3, 1)  # [B, Hf, Wf, A * 4]
            deltas.append(widen(by_cell.reshape(features.shape[0], -1, 4)))  # [B, Hf * Wf * A, 4]
        return logits, deltas

    def _by_cell(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # [B, C, Hf, Wf] -> [B, N_l], [B, N_l, 4]
        """Both 1x1 convolutions as one product of matrices, so that the features are read once."""
        anchors, batch = self.objectness.out_channels, hidden.shape[0]
        parts = (self.objectness, self.deltas)
        weight = torch.cat([part.weight.flatten(1) for part in parts])  # [A * 5, C]
        bias = torch.cat([part.get_parameter("bias") for part in parts])  # [A * 5]
        missing = -len(bias) % 8  # rows of half precision that tensor cores can write
        weight, bias = functional.pad(weight, (0, 0, 0, missing)), functional.pad(bias, (0, missing))
        outputs = functional.linear(by_pixel(hidden), weight, bias).float()  # [B * Hf * Wf, A * 5 and padding]
        own_deltas = outputs[:, anchors : anchors * 5].reshape(batch, -1, 4)  # [B, Hf * Wf * A, 4]
        return outputs[:, :anchors].reshape(batch, -1), own_deltas


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32: boxes, overlaps and probabilities are not safe in less."""
    return tensor.float() if tensor.dtype in HALF_PRECISION else tensor


class ProposalSelector(nn.Module):
    """The best anchors of each level, moved by their offsets, without near-duplicates.

    Args:
        candidates: best anchors of a level that enter NMS, (training, test).
        proposals: K, (training, test).
        nms_iou: overlap at which the worse box goes, within a level.
        min_size: shortest side, pixels.
    """

    def __init__(
        self, candidates: tuple[int, int], proposals: tuple[int, int], nms_iou: float, min_size: float
    ) -> None:
        super().__init__()
        self.candidates = candidates
        self.proposals = proposals
        self.nms_iou = nms_iou
        self.min_size = min_size

    @torch.no_grad()
    def forward(
        self,
        logits: list[Tensor],  # [B, N_l] a level
        deltas: list[Tensor],  # [B, N_l, 4] a level
        anchors: list[Tensor],  # [N_l, 4] a level
        sizes: Tensor,  # int64 [B, 2] (height, width) of each picture
    ) -> Proposals:
        """K padded proposals an image; the gradient stops here, as everywhere in this family."""
        candidates, keep = (pair[0 if self.training else 1] for pair in (self.candidates, self.proposals))
        boxes, scores = [], []
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
            # A level with fewer anchors than candidates is padded, so that its shape does not depend on the picture.
            # In a traced graph it depends on nothing at all: a comparison of sizes would hold for the example's alone.
            missing = candidates if is_traced() else max(candidates - level_logits.shape[1], 0)
            padded = functional.pad(level_logits, (0, missing), value=after_all(level_logits))
            best, index = padded.topk(candidates, dim=1)  # [B, candidates]
            # TorchScript's sizes are tensors on the CPU, which clamp refuses beside one on a GPU; what is padded counts
            # for nothing either way.
            size = level_logits.shape[1]
            index = index % size if torch.jit.is_tracing() else index.clamp(max=size - 1)
            chosen = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))  # [B, candidates, 4]
            boxes.append(decode_deltas(chosen, level_anchors[index], DELTA_WEIGHTS))
            scores.append(best)
        all_boxes = clip_boxes(torch.cat(boxes, dim=1), sizes)  # [B, L * candidates, 4]
        all_logits = torch.cat(scores, dim=1)  # [B, L * candidates]
        probabilities = all_logits.sigmoid()
        valid = (all_logits > after_all(all_logits)) & has_sides(all_boxes, self.min_size)
        level = torch.arange(len(boxes), device=sizes.device).repeat_interleave(candidates).expand_as(all_logits)
        index, kept = non_maximum_suppression(all_boxes, probabilities, level, valid, self.nms_iou, keep)
        return Proposals(
            boxes=all_boxes.gather(1, index[..., None].expand(-1, -1, 4)).masked_fill(~kept[..., None], 0.0),
            scores=probabilities.gather(1, index).masked_fill(~kept, 0.0),
            valid=kept,
        )
