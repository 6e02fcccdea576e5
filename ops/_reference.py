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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsg.ops._sampling import Axis, Placement, Sampling, accumulation_dtype, chunks, place


def forward(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, sampling: Sampling) -> Tensor:
    """features: one [N, C, Hf, Wf] per level; rois [R, 5]; prob [R, Hp, Wp] or None -> [R, C, H, W]."""
    dtype = accumulation_dtype(features[0].dtype)
    channels = features[0].shape[1]
    table = _cell_table(features, dtype)  # [T, C]
    placement = place(features, rois.detach().to(dtype), sampling)
    outputs = []
    for rows, y, x in chunks(placement, sampling, channels, table.shape[0]):
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
    placement = place(features, rois.detach().to(dtype), sampling)
    grad_table = torch.zeros_like(table)
    grad_prob = rois.new_zeros(0, dtype=dtype) if prob is None else torch.zeros_like(prob, dtype=dtype)
    for rows, y, x in chunks(placement, sampling, channels, table.shape[0]):
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


def _taps(placement: Placement, rows: slice, y: Axis, x: Axis) -> Iterator[tuple[Tensor, Tensor]]:
    """The four neighbours of each point: rows of the table and weights, both [k, ny, nx]."""
    base = placement.base[rows, None, None]
    width = placement.width[rows, None, None]
    for y_index, y_weight in ((y.low, 1 - y.fraction), (y.high, y.fraction)):
        for x_index, x_weight in ((x.low, 1 - x.fraction), (x.high, x.fraction)):
            index = base + y_index[:, :, None] * width + x_index[:, None, :]
            yield index, y_weight[:, :, None] * x_weight[:, None, :]


def _counted(placement: Placement, rows: slice, y: Axis, x: Axis) -> Tensor:
    """Which points add to the result, bool [k, ny, nx, 1]. `where`, not a weight of 0: 0 * nan is nan."""
    return (placement.valid[rows, None, None] & y.inside[:, :, None] & x.inside[:, None, :])[..., None]


def _sample_features(table: Tensor, placement: Placement, rows: slice, y: Axis, x: Axis) -> Tensor:
    counted = _counted(placement, rows, y, x)
    samples = sum(
        table[torch.where(counted[..., 0], index, 0)] * weight[..., None]
        for index, weight in _taps(placement, rows, y, x)
    )
    return torch.where(counted, samples, 0.0)  # [k, ny, nx, C]


def _scatter_to_table(
    grad_table: Tensor,
    grad: Tensor,
    placement: Placement,
    rows: slice,
    y: Axis,
    x: Axis,
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


def _sample_prob(prob: Tensor, y: Axis, x: Axis) -> Tensor:
    """prob [k, Hp, Wp] -> [k, ny, nx]. Sums, not matmul: that would follow the user's TF32 setting."""
    y_weights = _prob_matrix(y.position, prob.shape[1])  # [ny, Hp]
    x_weights = _prob_matrix(x.position, prob.shape[2])  # [nx, Wp]
    columns = (prob[:, :, None, :] * x_weights).sum(3)  # [k, Hp, nx]
    return (columns[:, None, :, :] * y_weights[..., None]).sum(2)


def _unsample_prob(grad: Tensor, prob: Tensor, y: Axis, x: Axis) -> Tensor:
    """The transpose of `_sample_prob`: grad [k, ny, nx] -> [k, Hp, Wp]."""
    y_weights = _prob_matrix(y.position, prob.shape[1])  # [ny, Hp]
    x_weights = _prob_matrix(x.position, prob.shape[2])  # [nx, Wp]
    columns = (grad[..., None] * x_weights).sum(2)  # [k, ny, Wp]
    return (columns[:, :, None, :] * y_weights[..., None]).sum(1)


def _sum_bins(samples: Tensor, counts: list[int], dim: int) -> Tensor:
    return torch.stack([part.sum(dim) for part in samples.split(counts, dim)], dim)


def _spread_bins(bins: Tensor, counts: list[int], dim: int) -> Tensor:
    return bins.repeat_interleave(torch.tensor(counts, device=bins.device), dim, output_size=sum(counts))
