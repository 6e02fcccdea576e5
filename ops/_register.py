"""The ops of torch.ops.dsg: schemas, plain PyTorch kernels, fakes, autograd and autocast.

The compiled libraries add kernels for the keys CPU and CUDA and nothing else; the rest is here once, so that
it does not matter which of them is present. Gradients flow to the features and to the map, not to the RoIs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsg.ops import _reference, _reference_nms
from dsg.ops._load import loaded_kernels
from dsg.ops._sampling import Sampling

_ONE = "SymInt output_height, SymInt output_width, float spatial_scale, int sampling_ratio, bool aligned"
_MANY = (
    "SymInt output_height, SymInt output_width, float[] spatial_scales, int sampling_ratio, bool aligned, "
    "float canonical_scale, int canonical_level"
)
_FLAGS = "bool need_features, bool need_prob, bool deterministic"
SCHEMAS = (
    f"sg_roi_align(Tensor features, Tensor rois, Tensor? prob, {_ONE}) -> Tensor",
    f"multiscale_sg_roi_align(Tensor[] features, Tensor rois, Tensor? prob, {_MANY}) -> Tensor",
    "sg_roi_align_backward(Tensor grad_output, Tensor features, Tensor rois, Tensor? prob, "
    f"{_ONE}, {_FLAGS}) -> (Tensor, Tensor)",
    "multiscale_sg_roi_align_backward(Tensor grad_output, Tensor[] features, Tensor rois, Tensor? prob, "
    f"{_MANY}, {_FLAGS}) -> (Tensor[], Tensor)",
    "batched_nms(Tensor boxes, Tensor groups, Tensor valid, float iou_threshold) -> Tensor",
)

_library = torch.library.Library("dsg", "DEF")


def _one(height: int, width: int, scale: float, sampling_ratio: int, aligned: bool) -> Sampling:
    return Sampling((height, width), (scale,), sampling_ratio, aligned)


def _many(
    height: int, width: int, scales: Sequence[float], ratio: int, aligned: bool, size: float, level: int
) -> Sampling:
    return Sampling((height, width), tuple(scales), ratio, aligned, size, level)


def _check_shapes(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None) -> None:
    """What the public functions check before; here for symbolic sizes, and for who calls torch.ops.dsg directly."""
    for level in features:
        torch._check(level.dim() == 4, lambda: f"features must be [N, C, Hf, Wf], got {level.shape}")  # noqa: B023
    torch._check(rois.dim() == 2, lambda: f"rois must be [K, 5], got {rois.shape}")
    torch._check(rois.shape[1] == 5, lambda: f"rois must be [K, 5], got {rois.shape}")
    if prob is not None:
        torch._check(prob.dim() == 3, lambda: f"prob must be [K, Hp, Wp], got {prob.shape}")
        torch._check(prob.shape[0] == rois.shape[0], lambda: f"{prob.shape[0]} maps for {rois.shape[0]} rois")


def output_format(features: Tensor) -> torch.memory_format:
    """Layout of the pooled features: on CUDA that of the features, for the convolutions that come next."""
    channels_last = features.device.type == "cuda" and features.shape[1] > 1 and features.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


# --- plain PyTorch kernels ------------------------------------------------------------------------


def _forward_one(features: Tensor, rois: Tensor, prob: Tensor | None, *sampling: Any) -> Tensor:
    _check_shapes([features], rois, prob)
    return _reference.forward([features], rois, prob, _one(*sampling)).to(memory_format=output_format(features))


def _forward_many(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, *sampling: Any) -> Tensor:
    _check_shapes(features, rois, prob)
    pooled = _reference.forward(features, rois, prob, _many(*sampling))
    return pooled.to(memory_format=output_format(features[0]))


def _backward_one(
    grad_output: Tensor, features: Tensor, rois: Tensor, prob: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    sampling = _one(*rest[:-3])
    grads, grad_prob = _reference.backward(grad_output, [features], rois, prob, sampling, *rest[-3:])
    return grads[0], grad_prob


def _backward_many(
    grad_output: Tensor, features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, *rest: Any
) -> tuple[list[Tensor], Tensor]:
    return _reference.backward(grad_output, features, rois, prob, _many(*rest[:-3]), *rest[-3:])


# --- fakes: shapes without numbers ----------------------------------------------------------------


def _fake_forward_one(
    features: Tensor, rois: Tensor, prob: Tensor | None, height: int, width: int, *rest: Any
) -> Tensor:
    _check_shapes([features], rois, prob)
    output = features.new_empty(rois.shape[0], features.shape[1], height, width)
    return output.to(memory_format=output_format(features))


def _fake_forward_many(
    features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, height: int, width: int, *rest: Any
) -> Tensor:
    _check_shapes(features, rois, prob)
    return _fake_forward_one(features[0], rois, prob, height, width)


def _fake_backward_many(
    grad_output: Tensor, features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, *rest: Any
) -> tuple[list[Tensor], Tensor]:
    need_features, need_prob, _ = rest[-3:]
    grads = [torch.empty_like(level) if need_features else level.new_empty(0) for level in features]
    if prob is None:
        return grads, features[0].new_empty(0)
    return grads, torch.empty_like(prob) if need_prob else prob.new_empty(0)


def _fake_backward_one(
    grad_output: Tensor, features: Tensor, rois: Tensor, prob: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    grads, grad_prob = _fake_backward_many(grad_output, [features], rois, prob, *rest)
    return grads[0], grad_prob


def _fake_nms(boxes: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid)


# --- autograd -------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, prob, *sampling = inputs
    levels = [features] if isinstance(features, Tensor) else features
    ctx.save_for_backward(rois, prob, *levels)
    ctx.sampling = sampling


def _differentiate_one(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    rois, prob, features = ctx.saved_tensors
    need_features, _, need_prob, *_ = ctx.needs_input_grad
    grad_features, grad_prob = torch.ops.dsg.sg_roi_align_backward(
        grad_output, features, rois, prob, *ctx.sampling, need_features, need_prob, _deterministic()
    )
    return grad_features if need_features else None, None, grad_prob if need_prob else None, *[None] * 5


def _differentiate_many(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    rois, prob, *features = ctx.saved_tensors
    need_features, _, need_prob, *_ = ctx.needs_input_grad
    need_any = any(need_features)
    grad_features, grad_prob = torch.ops.dsg.multiscale_sg_roi_align_backward(
        grad_output, features, rois, prob, *ctx.sampling, need_any, need_prob, _deterministic()
    )
    grads = [grad if needed else None for grad, needed in zip(grad_features, need_features, strict=True)]
    return grads, None, grad_prob if need_prob else None, *[None] * 7


def _deterministic() -> bool:
    # Read here because no kernel of the stable ABI can.
    return torch.are_deterministic_algorithms_enabled()


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("SgRoIAlign has no second derivative: drop create_graph=True, or detach its gradient")


# --- autocast -------------------------------------------------------------------------------------


def _without_autocast(op: Any, device: str) -> Callable[..., Any]:
    """The op runs in the dtype of its features: they stay as they come, and RoIs are never cast down.

    bfloat16 holds no pixel coordinate above 256 exactly: the usual casting of all arguments would move boxes.
    """

    def kernel(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return op(*args)

    return kernel


def _register() -> None:
    for schema in SCHEMAS:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    loaded_kernels()
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
        "sg_roi_align": (_forward_one, _fake_forward_one, _differentiate_one),
        "multiscale_sg_roi_align": (_forward_many, _fake_forward_many, _differentiate_many),
        "sg_roi_align_backward": (_backward_one, _fake_backward_one, _refuse_double_backward),
        "multiscale_sg_roi_align_backward": (_backward_many, _fake_backward_many, _refuse_double_backward),
    }
    for name, (reference, fake, differentiate) in implementations.items():
        # Below CPU and CUDA in the dispatcher's order: a compiled kernel takes over where there is one.
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dsg::{name}", fake, lib=_library)
        setup = None if name.endswith("_backward") else _save_for_backward
        torch.library.register_autograd(f"dsg::{name}", differentiate, setup_context=setup, lib=_library)
        op = getattr(torch.ops.dsg, name).default
        for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            _library.impl(name, _without_autocast(op, device), key)
    _library.impl("batched_nms", _reference_nms.batched_nms, "CompositeExplicitAutograd")
    torch.library.register_fake("dsg::batched_nms", _fake_nms, lib=_library)


_register()
