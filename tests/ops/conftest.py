"""The implementations of SgRoIAlign under one signature, so that every test runs on each."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsg.ops import _reference, kernel_name
from dsg.ops._sampling import Sampling

# align(features, rois, prob, sampling) -> [K, C, H, W], differentiable in features and prob
Align = Callable[[Sequence[Tensor], Tensor, Tensor | None, Sampling], Tensor]


class _Reference(torch.autograd.Function):
    """The plain PyTorch implementation with its own backward, also where a compiled kernel took its place."""

    @staticmethod
    def forward(ctx: Any, rois: Tensor, prob: Tensor | None, sampling: Sampling, *features: Tensor) -> Tensor:
        ctx.save_for_backward(rois, prob, *features)
        ctx.sampling = sampling
        return _reference.forward(features, rois, prob, sampling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rois, prob, *features = ctx.saved_tensors
        grads, grad_prob = _reference.backward(grad_output, features, rois, prob, ctx.sampling, True, True, False)
        return None, None if prob is None else grad_prob, None, *grads


def _through_reference(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, sampling: Sampling) -> Tensor:
    return _Reference.apply(rois, prob, sampling, *features)


def _through_op(features: Sequence[Tensor], rois: Tensor, prob: Tensor | None, sampling: Sampling) -> Tensor:
    (height, width), scales, *rest = sampling
    if len(features) == 1:
        return torch.ops.dsg.sg_roi_align(features[0], rois, prob, height, width, scales[0], *rest[:2])
    return torch.ops.dsg.multiscale_sg_roi_align(list(features), rois, prob, height, width, list(scales), *rest)


@pytest.fixture(params=["op", "reference"])
def align(request: pytest.FixtureRequest) -> Align:
    if request.param == "op":
        return _through_op
    if kernel_name() == "plain PyTorch":
        pytest.skip("the op is the reference here: no kernel is built")
    return _through_reference


@pytest.fixture
def reference() -> Align:
    return _through_reference


@pytest.fixture
def op() -> Align:
    return _through_op
