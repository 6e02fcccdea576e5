"""Where the sampling points of RoIs lie, for the plain PyTorch SgRoIAlign: levels, corners, bins, taps.

Letters and formulas: `_reference.py`. The compiled kernels have the same in csrc/sampling.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Adaptive sampling puts ceil(bin size) points into a bin. A box of 1e30 pixels is finite too, and must not
# hang the process: the cap is far above any bin of a real feature map.
MAX_ADAPTIVE_SAMPLES = 2048
# Elements of the largest temporary of a chunk (64 MiB in float32).
CHUNK_ELEMENTS = 1 << 24


class Sampling(NamedTuple):
    """How RoIs are sampled: the arguments of the op that are not tensors."""

    output_size: tuple[int, int]  # (H, W)
    spatial_scales: tuple[float, ...]  # feature pixels per image pixel, finest level first
    sampling_ratio: int  # S; <= 0: ceil(RoI size / output size), each axis and RoI on its own
    aligned: bool  # True: pixel centres lie at .5
    canonical_scale: float = 224.0  # sqrt(area) in image pixels of a RoI of level `canonical_level`
    canonical_level: int = 4


class Placement(NamedTuple):
    """Where each RoI lies in the table of cells; all [R]. An invalid RoI is placed as an empty box at 0."""

    valid: Tensor  # bool
    base: Tensor  # int64: first row of the RoI's level and image
    height: Tensor  # int64: Hf of its level
    width: Tensor  # int64
    start: tuple[Tensor, Tensor]  # (Y1, X1), feature pixels
    extent: tuple[Tensor, Tensor]  # (h, w), feature pixels


class Axis(NamedTuple):
    """The sampling points of k RoIs along one axis: n of them, in rising order of bins."""

    low: Tensor  # int64 [k, n]: the cell before the point
    high: Tensor  # int64 [k, n]: the cell after it
    fraction: Tensor  # [k, n]: weight of `high`
    inside: Tensor  # bool [k, n]
    position: Tensor  # [n]: u (or v), the place in the RoI, in (0, 1)
    counts: list[int]  # per bin: how many of the n points are its own
    samples: int  # S: what the bin's mean divides by


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything below it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def level_area_thresholds(sampling: Sampling) -> list[float]:
    """Areas (square image pixels) from which on a RoI goes to level 1, 2, ... of the levels given.

    floor(canonical_level + log2(sqrt(area) / canonical_scale + 1e-6)) >= level, solved for the area:
    comparing needs no log2, so that CPU and GPU agree on a box that lies at the edge of two levels.
    """
    first_level = math.floor(-math.log2(sampling.spatial_scales[0]) + 0.5)
    thresholds = []
    for index in range(1, len(sampling.spatial_scales)):
        relative = 2.0 ** (first_level + index - sampling.canonical_level) - 1e-6
        thresholds.append((sampling.canonical_scale * max(relative, 0.0)) ** 2)
    return thresholds


def place(features: Sequence[Tensor], rois: Tensor, sampling: Sampling) -> Placement:
    """rois [R, 5] in the accumulation dtype -> where each lies."""
    images = features[0].shape[0]
    index = rois[:, 0]  # [R]
    valid = rois.isfinite().all(1) & (index >= 0) & (index < images) & (index == index.floor())
    rois = torch.where(valid[:, None], rois, 0.0)
    x1, y1, x2, y2 = rois[:, 1:].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    level = torch.zeros_like(index, dtype=torch.int64)
    for threshold in level_area_thresholds(sampling):
        level += area >= threshold

    def of_level(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=rois.device)[level]  # [R]

    height = of_level([feature.shape[2] for feature in features])
    width = of_level([feature.shape[3] for feature in features])
    cells = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features]
    offset = of_level([sum(cells[:index]) for index in range(len(cells))])
    scale = of_level(sampling.spatial_scales, rois.dtype)
    shift = 0.5 if sampling.aligned else 0.0
    extents = (scale * (y2 - y1), scale * (x2 - x1))
    if not sampling.aligned:  # the old convention: no RoI is smaller than a feature pixel
        extents = (extents[0].clamp(min=1.0), extents[1].clamp(min=1.0))
    base = offset + rois[:, 0].long() * height * width
    starts = (scale * y1 - shift, scale * x1 - shift)
    return Placement(valid & (height * width > 0), base, height, width, starts, extents)


def chunks(placement: Placement, sampling: Sampling, channels: int, cells: int) -> Iterator[tuple[slice, Axis, Axis]]:
    """RoIs in chunks whose samples fit into CHUNK_ELEMENTS; adaptive sampling goes RoI by RoI."""
    count = placement.valid.shape[0] if cells > 0 else 0
    out_height, out_width = sampling.output_size
    fixed = sampling.sampling_ratio
    if fixed > 0:
        step = max(1, CHUNK_ELEMENTS // max(1, out_height * out_width * fixed * fixed * channels))
        for begin in range(0, count, step):
            rows = slice(begin, min(begin + step, count))
            y = _axis(placement.start[0][rows], placement.extent[0][rows], placement.height[rows], out_height, fixed)
            x = _axis(placement.start[1][rows], placement.extent[1][rows], placement.width[rows], out_width, fixed)
            yield rows, y, x
        return
    numbers = [
        (extent / out).ceil().clamp(0, MAX_ADAPTIVE_SAMPLES).long().tolist()
        for extent, out in zip(placement.extent, sampling.output_size, strict=True)
    ]
    for row in range(count):
        rows = slice(row, row + 1)
        y = _axis(
            placement.start[0][rows],
            placement.extent[0][rows],
            placement.height[rows],
            out_height,
            numbers[0][row],
        )
        x = _axis(
            placement.start[1][rows],
            placement.extent[1][rows],
            placement.width[rows],
            out_width,
            numbers[1][row],
        )
        yield rows, _drop_outside(y), _drop_outside(x)


def _axis(start: Tensor, extent: Tensor, cells: Tensor, bins: int, samples: int) -> Axis:
    """start, extent, cells [k]: corner and size of the RoIs (feature pixels) and of their level."""
    position = (torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5) / max(bins * samples, 1)
    place = start[:, None] + position * extent[:, None]  # [k, n]
    inside = (place >= -1) & (place <= cells[:, None])
    last = (cells[:, None] - 1).clamp(min=0)
    place = place.clamp(min=0).minimum(last.to(place.dtype))
    low = place.long()
    return Axis(low, torch.minimum(low + 1, last), place - low, inside, position, [samples] * bins, samples)


def _drop_outside(axis: Axis) -> Axis:
    """For one RoI (k = 1): without the points outside the level, which add nothing.

    So a huge RoI costs no more than a level has cells.
    """
    keep = axis.inside[0]  # [n]
    counts = keep.view(len(axis.counts), axis.samples).sum(1).tolist() if axis.samples else axis.counts
    taps = (axis.low[:, keep], axis.high[:, keep], axis.fraction[:, keep], axis.inside[:, keep])
    return Axis(*taps, axis.position[keep], counts, axis.samples)
