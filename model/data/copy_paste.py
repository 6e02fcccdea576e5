"""Simple copy-paste: masked objects of one picture laid over another (Ghiasi et al., 2021).

n: objects of the picture below, s: of the picture above, p: pasted ones.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsg.model.data.masks import Patch
from dsg.model.data.sample import Sample
from dsg.model.data.semantic_maps import UNKNOWN

MIN_VISIBLE = 0.1
"""Share of an object's mask that must stay visible; below it the object is dropped."""
MAX_COVERED = 0.5
"""Share of the box of an object without a mask that may be covered; above it the object is dropped."""


def copy_paste(below: Sample, above: Sample, rng: np.random.Generator) -> Sample:
    """`below` with a random number of randomly chosen masked objects of `above` on top of it.

    Objects that get covered keep what is visible: their masks lose the covered pixels, and where that happens
    the box becomes the box of the rest. Objects without a mask are never pasted; below, they stay as they are
    unless mostly covered. Crowd regions of `below` stay, those of `above` are not taken over.

    Args:
        below, above: samples of any sizes; `above` is cut or padded, right and below, to the size of `below`.
        rng: draws which objects.

    Returns:
        A new sample of the size and image_id of `below`; `below` itself if nothing can be pasted.
    """
    image, target = below
    height, width = image.shape[1:]
    candidates = torch.nonzero(above[1]["has_mask"]).flatten()
    if not len(candidates):
        return below
    count = int(rng.integers(1, len(candidates) + 1))
    chosen = candidates[torch.from_numpy(np.sort(rng.permutation(len(candidates))[:count]))]
    pasted = {key: above[1][key][chosen] for key in ("boxes", "labels", "masks", "has_mask")}
    pasted = _fit(pasted, above[1]["masks"].shape[1:], (height, width))
    if not len(pasted["boxes"]):
        return below
    cover = pasted["masks"].amax(dim=0)  # uint8 [H, W]
    pixels = _resize_canvas(above[0], height, width)
    kept = _uncovered(target, cover)
    merged = {key: torch.cat([kept[key], pasted[key]]) for key in pasted}
    if "semantic" in target:  # what was pasted has no place in the classes of a map
        merged["semantic"] = target["semantic"].masked_fill(cover.bool(), UNKNOWN)
    return torch.where(cover.bool(), pixels, image), {**target, **merged}


def _fit(objects: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """Objects with masks cut or padded from `old` to `new` (height, width), without those that vanish."""
    masks = _resize_canvas(objects["masks"], *new)  # [p, H, W]
    visible = _pixels(masks) > 0
    if old[0] <= new[0] and old[1] <= new[1]:
        boxes = objects["boxes"]
    else:
        boxes = _boxes_where_changed(objects["boxes"], objects["masks"], masks)
    objects = {**objects, "masks": masks, "boxes": boxes}
    return {key: value[visible] for key, value in objects.items()}


def _uncovered(target: dict[str, Any], cover: Tensor) -> dict[str, Tensor]:
    """What stays visible of a target's objects below `cover` (uint8 [H, W])."""
    masks, has_mask = target["masks"], target["has_mask"]
    visible = masks & (1 - cover)  # [n, H, W]
    before = _pixels(masks)  # [n]
    after = _pixels(visible)
    keep_masked = (after > 0) & (after >= MIN_VISIBLE * before)
    keep = torch.where(has_mask, keep_masked, _covered_share(target["boxes"], cover) <= MAX_COVERED)
    return {
        "boxes": _boxes_where_changed(target["boxes"], masks, visible)[keep],
        "labels": target["labels"][keep],
        "masks": visible[keep],
        "has_mask": has_mask[keep],
    }


def _boxes_where_changed(
    boxes: Tensor,  # float32 [n, 4]
    before: Tensor,  # uint8 [n, H, W]
    after: Tensor,  # uint8 [n, h, w]
) -> Tensor:
    """Boxes float32 [n, 4]: those of masks that lost pixels, but not all, fit what is left."""
    boxes = boxes.clone()
    left = _pixels(after)
    for index in torch.nonzero((left < _pixels(before)) & (left > 0)).flatten().tolist():
        boxes[index] = torch.tensor(Patch(after[index].numpy(), 0, 0).box())
    return boxes


def _pixels(
    masks: Tensor,  # uint8 [n, H, W] of 0 and 1
) -> Tensor:
    """int64 [n]: pixels of each mask. NumPy counts booleans many times faster than torch sums bytes."""
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy().view(bool)], dtype=torch.int64)


def _covered_share(
    boxes: Tensor,  # float32 [n, 4]
    cover: Tensor,  # uint8 [H, W]
) -> Tensor:
    """float64 [n]: share of each box's pixels that is covered."""
    # Sums over all rectangles from the origin, so that a box costs four look-ups.
    sums = functional.pad(cover.to(torch.float64).cumsum(0).cumsum(1), (1, 0, 1, 0))  # [H + 1, W + 1]
    x1, y1 = boxes[:, :2].floor().long().unbind(1)
    x2, y2 = boxes[:, 2:].ceil().long().unbind(1)
    covered = sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1]
    return covered / ((x2 - x1) * (y2 - y1)).clamp(min=1)


def _resize_canvas(tensor: Tensor, height: int, width: int) -> Tensor:
    """[..., h, w] cut or padded with 0, right and below, to [..., height, width]."""
    tensor = tensor[..., :height, :width]
    return functional.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]))
