"""Masks to COCO RLE on a CUDA device: what crosses to the host is the finished text.

A thread walks one column of one mask (`csrc/cuda/mask_columns.cuh`), so time grows with the boxes' areas and no mask
exists at the picture's size. Running sums between the steps say where each thread writes.

Letters: `N` masks, `m` side of a mask, `W` columns of the widest picture.
"""

from itertools import pairwise

import torch
from torch import Tensor

from dsg.ops._load import loaded_kernels

# Masks of noise change in every few pixels of a column: such are encoded in parts, about 25 bytes for each change.
_MOST_CHANGES = 1 << 20
_MOST_PIXELS = 1 << 31  # places in a picture are int32


def can_encode(probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> bool:
    """Whether `encode_on_cuda` takes these, the boxes as float32: on a GPU for which the kernels are there."""
    singles = probs.dtype == torch.float32 and boxes.dtype != torch.float64
    small = image_size[0] * image_size[1] < _MOST_PIXELS
    return probs.is_cuda and boxes.is_cuda and singles and small and "cuda" in loaded_kernels()


def encode_on_cuda(
    probs: Tensor,  # [N, m, m]
    boxes: Tensor,  # [N, 4]
    sizes: Tensor,  # int64 [N, 2]
    columns: int,
    threshold: float,
    on_grid: bool,
) -> tuple[list[str], list[int]]:
    """COCO's compressed counts of each mask, and how many of its pixels are set.

    Args:
        probs: float32 [N, m, m] in [0, 1]; boxes: float32 [N, 4] xyxy pixels; both as in `dsg.ops.encode_masks`.
        sizes: (height, width) of each mask's picture, on the device.
        columns: W, of the widest of them.
        threshold: a pixel is set where its probability is at least this.
        on_grid: sampled at pixel centres, `paste="grid"`; else torchvision's convention.
    """
    if len(probs) == 0:
        return [], []
    how = columns, threshold, on_grid
    masks = probs.contiguous(), boxes.contiguous(), sizes.contiguous()
    changes_of, pixels_of = torch.ops.dsg.mask_column_counts(*masks, *how)  # int64 [N, W] each
    ends = changes_of.flatten().cumsum(0)  # [N * W]
    totals = torch.cat([ends[columns - 1 :: columns], pixels_of.sum(dim=1)])  # [2 * N]
    numbers = totals.tolist()  # the host waits here, ...
    of_masks, areas = numbers[: len(probs)], numbers[len(probs) :]
    texts: list[str] = []
    for first, last in _parts(of_masks):
        part = tuple(tensor[first:last] for tensor in masks)
        places, own_ends = ends[first * columns : last * columns], totals[first:last]  # [n * W], [n]
        before = of_masks[first - 1] if first else 0
        if before:
            places, own_ends = places - before, own_ends - before
        total = of_masks[last - 1] - before
        changes = torch.ops.dsg.mask_changes(*part, *how, places, total)  # int32 [total]
        texts += _texts(changes, own_ends, part[2])
    return texts, areas


def _texts(
    changes: Tensor,  # int32 [total]
    ends: Tensor,  # int64 [n]
    sizes: Tensor,  # int64 [n, 2]
) -> list[str]:
    lengths = torch.ops.dsg.rle_lengths(changes, ends, sizes)  # int64 [total + n]
    text_ends = lengths.cumsum(0)  # [total + n]
    cuts = torch.ops.dsg.rle_cuts(text_ends, ends, len(changes)).tolist()  # ... here, ...
    text = torch.ops.dsg.rle_text(changes, ends, sizes, text_ends, cuts[-1])  # uint8 [characters]
    whole = text.cpu().numpy().tobytes().decode("ascii")  # ... and here
    return [whole[begin:end] for begin, end in pairwise([0, *cuts])]


def _parts(ends: list[int]) -> list[tuple[int, int]]:
    """Ranges of masks whose changes fit into memory together; at least one mask each."""
    parts, first, before = [], 0, 0
    for number, end in enumerate(ends):
        if number > first and end - before > _MOST_CHANGES:
            parts.append((first, number))
            first, before = number, ends[number - 1]
    return [*parts, (first, len(ends))]
