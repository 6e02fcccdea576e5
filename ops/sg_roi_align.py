"""SgRoIAlign: RoIAlign whose samples are weighed by a shape probability map of each RoI.

Legend: N images, C channels, Hf x Wf a feature level, K RoIs, H x W the output, Hp x Wp the probability map.
`_reference.py` beside this file says exactly what is computed; `_load.py` which implementation runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsg.ops import _register  # noqa: F401  (registers torch.ops.dsg.*)

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What a kernel launch carries by value; a pyramid has five.
MAX_LEVELS = 8


def sg_roi_align(
    features: Tensor,  # [N, C, Hf, Wf]
    rois: Tensor,  # [K, 5]
    prob: Tensor | None,  # [K, Hp, Wp]
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Tensor:
    """Pools `features` inside each RoI: the mean over sampling points of f * (1 + p).

    f is the feature map, read bilinearly at the point; p the RoI's own map, stretched over the RoI. Where p
    is 0 the feature counts once, where it is 1 twice. Differentiable in `features` and `prob`, not in `rois`,
    and once only. Under autocast it runs in the dtype of `features`.

    Args:
        features: Tensor[N, C, Hf, Wf] of float32, float64, float16 or bfloat16, in any memory format.
            Anything below float64 is summed in float32.
        rois: Tensor[K, 5] of float32 or float64, whatever the features are: (batch index, x1, y1, x2, y2) in
            image pixels. A RoI with a coordinate that is not finite, or with a batch index that is no integer
            in 0..N-1, gives zeros and no gradient.
        prob: Tensor[K, Hp, Wp] in [0, 1] of any of the dtypes above, or None for plain RoIAlign.
        output_size: H and W of the output; an int gives both.
        spatial_scale: feature pixels per image pixel, 1/4 for a level of stride 4.
        sampling_ratio: sampling points of an output bin along each axis; 0 or less: ceil(bin size), from 0
            points for a RoI of no size up to 2048.
        aligned: pixel centres lie at 0.5 (half-pixel shift). False is the old convention, where they lie at 0
            and no RoI is smaller than a feature pixel.

    Returns:
        Tensor[K, C, H, W], contiguous, in the dtype of `features`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or value, or tensors on several devices.
    """
    _check_tensors([features], rois, prob)
    height, width = _check_sampling(output_size, sampling_ratio, [spatial_scale])
    return torch.ops.dsg.sg_roi_align(
        features, rois, prob, height, width, float(spatial_scale), sampling_ratio, aligned
    )


def multiscale_sg_roi_align(
    features: Sequence[Tensor],  # [N, C, Hf, Wf] per level
    rois: Tensor,  # [K, 5]
    prob: Tensor | None,  # [K, Hp, Wp]
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = True,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`sg_roi_align` on a feature pyramid: each RoI is pooled from the level that fits its size.

    The level is floor(canonical_level + log2(sqrt(area) / canonical_scale + 1e-6)), area in square image
    pixels, kept within the levels given. The first level is the one of its scale, -log2(spatial_scales[0]),
    each further one the next. One kernel launch on CUDA.

    Args:
        features: a list of 1 to 8 Tensor[N, C, Hf, Wf], finest first, of one dtype and with the same N and C.
        rois, prob, output_size, sampling_ratio, aligned: as in `sg_roi_align`.
        spatial_scales: feature pixels per image pixel of each level, for example (1/4, 1/8, 1/16, 1/32).
        canonical_scale: sqrt(area), in image pixels, of a RoI that goes to `canonical_level`.
        canonical_level: that level, counted so that level n has stride 2 ** n.

    Returns:
        Tensor[K, C, H, W], contiguous, in the dtype of `features`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or value, or tensors on several devices.
    """
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features must be a list of tensors, finest first, got {type(features).__name__}")
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"features must have 1 to {MAX_LEVELS} levels, got {len(features)}")
    if len(spatial_scales) != len(features):
        raise ValueError(
            f"spatial_scales must have one entry per level: {len(spatial_scales)} for {len(features)} levels"
        )
    if canonical_scale <= 0:
        raise ValueError(f"canonical_scale must be above 0, got {canonical_scale}")
    _check_tensors(features, rois, prob)
    height, width = _check_sampling(output_size, sampling_ratio, spatial_scales)
    return torch.ops.dsg.multiscale_sg_roi_align(
        list(features),
        rois,
        prob,
        height,
        width,
        [float(scale) for scale in spatial_scales],
        sampling_ratio,
        aligned,
        float(canonical_scale),
        canonical_level,
    )


class SgRoIAlign(nn.Module):
    """`sg_roi_align` with its settings kept; no parameters."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        _check_sampling(output_size, sampling_ratio, [spatial_scale])
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, features: Tensor, rois: Tensor, prob: Tensor | None = None) -> Tensor:
        """features [N, C, Hf, Wf], rois [K, 5] in image pixels, prob [K, Hp, Wp] or None -> [K, C, H, W]."""
        return sg_roi_align(
            features, rois, prob, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class MultiScaleSgRoIAlign(nn.Module):
    """`multiscale_sg_roi_align` with its settings kept; no parameters."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scales: Sequence[float],
        sampling_ratio: int = 2,
        aligned: bool = True,
        canonical_scale: float = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        _check_sampling(output_size, sampling_ratio, spatial_scales)
        self.output_size = output_size
        self.spatial_scales = tuple(spatial_scales)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, features: Sequence[Tensor], rois: Tensor, prob: Tensor | None = None) -> Tensor:
        """features [N, C, Hf, Wf] per level, rois [K, 5], prob [K, Hp, Wp] or None -> [K, C, H, W]."""
        return multiscale_sg_roi_align(
            features,
            rois,
            prob,
            self.output_size,
            self.spatial_scales,
            self.sampling_ratio,
            self.aligned,
            self.canonical_scale,
            self.canonical_level,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scales={self.spatial_scales}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, "
            f"canonical_scale={self.canonical_scale}, canonical_level={self.canonical_level}"
        )


def _check_sampling(
    output_size: int | tuple[int, int], sampling_ratio: int, spatial_scales: Sequence[float]
) -> tuple[int, int]:
    """The output's (H, W), when all is in order."""
    integers = (int, torch.SymInt)
    size = (output_size, output_size) if isinstance(output_size, integers) else output_size
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, integers) for side in size):
        raise TypeError(f"output_size must be an int or (H, W), got {output_size!r}")
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
    if not isinstance(sampling_ratio, int):
        raise TypeError(f"sampling_ratio must be an int, got {type(sampling_ratio).__name__}")
    if not all(scale > 0 for scale in spatial_scales):
        raise ValueError(f"spatial scales must be above 0, got {list(spatial_scales)}")
    return height, width


def _check_tensors(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None) -> None:
    first = features[0]
    many = len(features) > 1
    named = [(f"features[{index}]" if many else "features", level) for index, level in enumerate(features)]
    named.append(("rois", rois))
    if prob is not None:
        named.append(("prob", prob))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        allowed = _FLOATS[:2] if name == "rois" else _FLOATS
        if tensor.dtype not in allowed:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{name} must be one of {wanted}, got {tensor.dtype}")
        if name.startswith("features[") and tensor.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} as features[0], got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device} as the features are, got {tensor.device}")
        dims = {"rois": 2, "prob": 3}.get(name, 4)
        if tensor.dim() != dims:
            wanted = {2: "[K, 5]", 3: "[K, Hp, Wp]", 4: "[N, C, Hf, Wf]"}[dims]
            raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)}")
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return  # sizes are symbols there; the fake kernels state what must hold
    if rois.shape[1] != 5:
        raise ValueError(f"rois must be [K, 5] (batch index, x1, y1, x2, y2), got {list(rois.shape)}")
    for index, level in enumerate(features):
        if level.shape[:2] != first.shape[:2]:
            wanted = f"[{first.shape[0]}, {first.shape[1]}, Hf, Wf] as features[0]"
            raise ValueError(f"features[{index}] must be {wanted}, got {list(level.shape)}")
    if prob is not None and (prob.shape[0] != rois.shape[0] or 0 in prob.shape[1:]):
        wanted = f"[{rois.shape[0]}, Hp, Wp], a map for each RoI"
        raise ValueError(f"prob must be {wanted}, got {list(prob.shape)}")
