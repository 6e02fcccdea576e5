"""SgRoIAlign in plain PyTorch: the specification, and what runs where no compiled kernel is.

Legend: N images, C channels, Hf x Wf a feature level, R RoIs, H x W the output, Hp x Wp the probability map,
S sampling points of a bin along one axis, k the RoIs of a chunk, ny and nx sampling rows and columns of a RoI
(H * S and W * S), T all cells of all levels and images laid out as the rows of one table.

With the RoI's corner (Y1, X1) and size (h, w) in feature pixels, sampling point (u, v) in (0, 1) x (0, 1)
of the RoI reads the features at (a, b) = (Y1 + u * h, X1 + v * w) and the map at
(c, d) = (u * Hp - 0.5, v * Wp - 0.5):

    output bin = mean over its S * S points of  f(a, b) * (1 + p(c, d))

f is bilinear, clamped to the level, and zero beyond one pixel outside it; p is bilinear, clamped to the map
and never zero outside it. A RoI has its own map, so c and d do not depend on where the RoI lies.
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


class _Placement(NamedTuple):
    """Where each RoI lies in the table of cells; all [R]. An invalid RoI is placed as an empty box at 0."""

    valid: Tensor  # bool
    base: Tensor  # int64: first row of the RoI's level and image
    height: Tensor  # int64: Hf of its level
    width: Tensor  # int64
    start: tuple[Tensor, Tensor]  # (Y1, X1), feature pixels
    extent: tuple[Tensor, Tensor]  # (h, w), feature pixels


class _Axis(NamedTuple):
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


def forward(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, sampling: Sampling) -> Tensor:
    """features: one [N, C, Hf, Wf] per level; rois [R, 5]; prob [R, Hp, Wp] or None -> [R, C, H, W]."""
    dtype = accumulation_dtype(features[0].dtype)
    channels = features[0].shape[1]
    table = _cell_table(features, dtype)  # [T, C]
    placement = _place(features, rois.detach().to(dtype), sampling)
    outputs = []
    for rows, y, x in _chunks(placement, sampling, channels, table.shape[0]):
        samples = _sample_features(table, placement, rows, y, x)  # [k, ny, nx, C]
        if prob is not None:
            samples = samples * (1 + _sample_prob(prob[rows].to(dtype), y, x))[..., None]
        bins = _sum_bins(_sum_bins(samples, y.counts, 1), x.counts, 2)  # [k, H, W, C]
        outputs.append(bins.permute(0, 3, 1, 2) / max(y.samples * x.samples, 1))
    if not outputs:  # no RoIs, or no cell to read
        return table.new_zeros(rois.shape[0], channels, *sampling.output_size).to(features[0].dtype)
    return torch.cat(outputs).to(features[0].dtype, memory_format=torch.contiguous_format)


def backward(
    grad_output: Tensor,  # [R, C, H, W]
    features: Sequence[Tensor],
    rois: Tensor,
    prob: Tensor | None,
    sampling: Sampling,
    need_features: bool,
    need_prob: bool,
    deterministic: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients like `features` and like `prob`; one that is not needed has no elements."""
    dtype = accumulation_dtype(features[0].dtype)
    channels = features[0].shape[1]
    table = _cell_table(features, dtype)  # [T, C]
    placement = _place(features, rois.detach().to(dtype), sampling)
    grad_table = torch.zeros_like(table)
    grad_prob = rois.new_zeros(0, dtype=dtype) if prob is None else torch.zeros_like(prob, dtype=dtype)
    for rows, y, x in _chunks(placement, sampling, channels, table.shape[0]):
        grad = grad_output[rows].to(dtype).permute(0, 2, 3, 1)  # [k, H, W, C]
        grad = _spread_bins(_spread_bins(grad, y.counts, 1), x.counts, 2) / max(y.samples * x.samples, 1)
        grad = torch.where(_counted(placement, rows, y, x), grad, 0.0)
        if need_prob and prob is not None:
            samples = _sample_features(table, placement, rows, y, x)  # [k, ny, nx, C]
            grad_prob[rows] = _unsample_prob((grad * samples).sum(-1), prob, y, x)
        if need_features:
            if prob is not None:
                grad = grad * (1 + _sample_prob(prob[rows].to(dtype), y, x))[..., None]
            _scatter_to_table(grad_table, grad, placement, rows, y, x, deterministic)
    grad_features = [torch.empty_like(level) if need_features else level.new_empty(0) for level in features]
    if need_features:
        cells = [level.shape[0] * level.shape[2] * level.shape[3] for level in features]
        for like, part in zip(grad_features, grad_table.split(cells), strict=True):
            images, _, height, width = like.shape
            like.copy_(part.view(images, height, width, channels).permute(0, 3, 1, 2))
    if prob is None or not need_prob:
        return grad_features, rois.new_empty(0, dtype=features[0].dtype if prob is None else prob.dtype)
    return grad_features, torch.empty_like(prob).copy_(grad_prob)


def _cell_table(features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    channels = features[0].shape[1]
    rows = [level.permute(0, 2, 3, 1).reshape(level[:, 0].numel(), channels) for level in features]
    return torch.cat([level.to(dtype) for level in rows])  # [T, C]


def _place(features: Sequence[Tensor], rois: Tensor, sampling: Sampling) -> _Placement:
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
    return _Placement(valid & (height * width > 0), base, height, width, starts, extents)


def _chunks(
    placement: _Placement, sampling: Sampling, channels: int, cells: int
) -> Iterator[tuple[slice, _Axis, _Axis]]:
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


def _axis(start: Tensor, extent: Tensor, cells: Tensor, bins: int, samples: int) -> _Axis:
    """start, extent, cells [k]: corner and size of the RoIs (feature pixels) and of their level."""
    position = (torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5) / max(bins * samples, 1)
    place = start[:, None] + position * extent[:, None]  # [k, n]
    inside = (place >= -1) & (place <= cells[:, None])
    last = (cells[:, None] - 1).clamp(min=0)
    place = place.clamp(min=0).minimum(last.to(place.dtype))
    low = place.long()
    return _Axis(low, torch.minimum(low + 1, last), place - low, inside, position, [samples] * bins, samples)


def _drop_outside(axis: _Axis) -> _Axis:
    """For one RoI (k = 1): without the points outside the level, which add nothing.

    So a huge RoI costs no more than a level has cells.
    """
    keep = axis.inside[0]  # [n]
    counts = keep.view(len(axis.counts), axis.samples).sum(1).tolist() if axis.samples else axis.counts
    taps = (axis.low[:, keep], axis.high[:, keep], axis.fraction[:, keep], axis.inside[:, keep])
    return _Axis(*taps, axis.position[keep], counts, axis.samples)


def _taps(placement: _Placement, rows: slice, y: _Axis, x: _Axis) -> Iterator[tuple[Tensor, Tensor]]:
    """The four neighbours of each point: rows of the table and weights, both [k, ny, nx]."""
    base = placement.base[rows, None, None]
    width = placement.width[rows, None, None]
    for y_index, y_weight in ((y.low, 1 - y.fraction), (y.high, y.fraction)):
        for x_index, x_weight in ((x.low, 1 - x.fraction), (x.high, x.fraction)):
            index = base + y_index[:, :, None] * width + x_index[:, None, :]
            yield index, y_weight[:, :, None] * x_weight[:, None, :]


def _counted(placement: _Placement, rows: slice, y: _Axis, x: _Axis) -> Tensor:
    """Which points add to the result, bool [k, ny, nx, 1]. `where`, not a weight of 0: 0 * nan is nan."""
    return (placement.valid[rows, None, None] & y.inside[:, :, None] & x.inside[:, None, :])[..., None]


def _sample_features(table: Tensor, placement: _Placement, rows: slice, y: _Axis, x: _Axis) -> Tensor:
    counted = _counted(placement, rows, y, x)
    samples = sum(
        table[torch.where(counted[..., 0], index, 0)] * weight[..., None]
        for index, weight in _taps(placement, rows, y, x)
    )
    return torch.where(counted, samples, 0.0)  # [k, ny, nx, C]


def _scatter_to_table(
    grad_table: Tensor,
    grad: Tensor,
    placement: _Placement,
    rows: slice,
    y: _Axis,
    x: _Axis,
    deterministic: bool,
) -> None:
    """Adds grad [k, ny, nx, C] to the cells of grad_table [T, C] that each point was read from."""
    counted = _counted(placement, rows, y, x)
    for index, weight in _taps(placement, rows, y, x):
        index = torch.where(counted[..., 0], index, 0).flatten()  # [k * ny * nx]
        values = (grad * weight[..., None]).flatten(0, 2)  # [k * ny * nx, C]
        if deterministic and grad.is_cuda:
            grad_table.index_put_((index,), values, accumulate=True)  # sorts; index_add_ uses atomics
        else:
            grad_table.index_add_(0, index, values)


def _prob_matrix(position: Tensor, cells: int) -> Tensor:
    """Bilinear weights [n, cells] of points at `position` [n] in (0, 1) of a map of `cells` cells."""
    place = (position * cells - 0.5).clamp(0, max(cells - 1, 0))
    return (1 - (place[:, None] - torch.arange(cells, device=place.device)).abs()).clamp(min=0)


def _sample_prob(prob: Tensor, y: _Axis, x: _Axis) -> Tensor:
    """prob [k, Hp, Wp] -> [k, ny, nx]. Sums, not matmul: that would follow the user's TF32 setting."""
    y_weights = _prob_matrix(y.position, prob.shape[1])  # [ny, Hp]
    x_weights = _prob_matrix(x.position, prob.shape[2])  # [nx, Wp]
    columns = (prob[:, :, None, :] * x_weights).sum(3)  # [k, Hp, nx]
    return (columns[:, None, :, :] * y_weights[..., None]).sum(2)


def _unsample_prob(grad: Tensor, prob: Tensor, y: _Axis, x: _Axis) -> Tensor:
    """The transpose of `_sample_prob`: grad [k, ny, nx] -> [k, Hp, Wp]."""
    y_weights = _prob_matrix(y.position, prob.shape[1])  # [ny, Hp]
    x_weights = _prob_matrix(x.position, prob.shape[2])  # [nx, Wp]
    columns = (grad[..., None] * x_weights).sum(2)  # [k, ny, Wp]
    return (columns[:, :, None, :] * y_weights[..., None]).sum(1)


def _sum_bins(samples: Tensor, counts: list[int], dim: int) -> Tensor:
    return torch.stack([part.sum(dim) for part in samples.split(counts, dim)], dim)


def _spread_bins(bins: Tensor, counts: list[int], dim: int) -> Tensor:
    return bins.repeat_interleave(torch.tensor(counts, device=bins.device), dim, output_size=sum(counts))
