"""SgRoIAlign on what callers may hand it: bad boxes, empty batches, any memory layout, and plain mistakes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsg.ops import multiscale_sg_roi_align, sg_roi_align
from dsg.ops._sampling import Sampling

Align = Callable[..., Tensor]
SAMPLINGS = [1, 2, 0]
# In and around two pictures of 36 x 32 pixels; the last one is outside.
ROIS = torch.tensor(
    [
        [0, 1.5, 2.25, 13, 11],
        [1, -8, -6, 20.5, 28],
        [0, 3, 3, 3.25, 3.5],
        [1, 10, 0, 45, 9.75],
        [0, 0, 0, 32, 36],
        [1, 17.3, 20.9, 25.1, 31.7],
        [0, 60, 60, 70, 80],
    ]
)


BAD_ROIS = {
    "nan": [0, math.nan, 1, 5, 5],
    "infinite": [0, 1, 1, math.inf, 5],
    "minus infinite": [0, 1, -math.inf, 3, 5],
    "image too large": [2, 1, 1, 5, 5],
    "image negative": [-1, 1, 1, 5, 5],
    "image huge": [1e30, 1, 1, 5, 5],
    "image nan": [math.nan, 1, 1, 5, 5],
    "image not whole": [0.5, 1, 1, 5, 5],
}


@pytest.mark.parametrize("ratio", SAMPLINGS)
@pytest.mark.parametrize("bad", BAD_ROIS.values(), ids=BAD_ROIS.keys())
def test_bad_roi_gives_zeros_and_no_gradient(align: Align, bad: list[float], ratio: int) -> None:
    features = torch.randn(2, 3, 6, 6, requires_grad=True)
    prob = torch.rand(2, 4, 4, requires_grad=True)
    good = [1.0, 1.5, 2, 9, 8]
    sampling = Sampling((2, 2), (0.5,), ratio, True)
    output = align([features], torch.tensor([bad, good]), prob, sampling)
    alone = align([features], torch.tensor([good]), prob[1:], sampling)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.equal(output[1], alone[0])
    # Even a gradient of nan goes nowhere from a RoI that read nothing.
    upstream = torch.stack([torch.full((3, 2, 2), math.nan), torch.ones(3, 2, 2)])
    grad_features, grad_prob = torch.autograd.grad(output, (features, prob), upstream)
    (grad_alone,) = torch.autograd.grad(alone, features, upstream[1:])
    torch.testing.assert_close(grad_features, grad_alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(grad_prob[0], torch.zeros(4, 4))
    assert grad_prob[1].abs().sum() > 0


@pytest.mark.parametrize("ratio", SAMPLINGS)
def test_nan_outside_the_roi_stays_outside(align: Align, ratio: int) -> None:
    features = torch.ones(1, 1, 12, 12)
    features[0, 0, 0, 0] = math.nan
    rois = torch.tensor([[0.0, 8, 8, 20, 20], [0, 100, 100, 120, 120], [math.nan, 0, 0, 4, 4]])
    output = align([features], rois, None, Sampling((2, 2), (0.5,), ratio, True))
    torch.testing.assert_close(output[:, 0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("ratio", SAMPLINGS)
def test_absurd_but_finite_boxes_end(align: Align, ratio: int) -> None:
    features = torch.randn(1, 2, 6, 6, requires_grad=True)
    prob = torch.rand(4, 3, 3, requires_grad=True)
    rois = torch.tensor(
        [[0, -1e30, -1e30, 1e30, 1e30], [0, 3e38, 0, 3e38, 5], [0, 0, 0, 1e8, 2], [0, 5, 5, -1e20, -1e20]]
    )
    output = align([features], rois, prob, Sampling((2, 2), (0.5,), ratio, True))
    assert output.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (features, prob)))


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("ratio", [2, 0])
def test_empty_batches(align: Align, ratio: int, count: int, images: int) -> None:
    features = [torch.randn(images, 3, 8 >> i, 8 >> i, requires_grad=True) for i in range(2)]
    prob = torch.rand(count, 4, 4, requires_grad=True)
    rois = ROIS[:count]
    output = align(features, rois, prob, Sampling((2, 3), (0.5, 0.25), ratio, True))
    assert output.shape == (count, 3, 2, 3)
    grads = torch.autograd.grad(output.sum(), (*features, prob))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in (*features, prob)]
    if count == 0 or images == 0:
        assert all(not tensor.any() for tensor in (output, *grads))


def test_level_without_cells_gives_zeros(align: Align) -> None:
    features = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 0, 2)]
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [0, 0, 0, 400, 400]])
    output = align(features, rois, None, Sampling((1, 1), (1 / 4, 1 / 8), 1, True))
    assert output[:, 0, 0, 0].tolist() == [1.0, 0.0]


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second element of a larger tensor, the last two dimensions swapped in memory."""
    larger = tensor.new_full((*tensor.shape[:-2], tensor.shape[-1] * 2, tensor.shape[-2] * 2), math.nan)
    view = larger[..., ::2, ::2].transpose(-1, -2)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels-last", "strided", "one channel of many"])
def test_layouts(align: Align, layout: str, dtype: torch.dtype) -> None:
    features = torch.randn(2, 6, 9, 8).to(dtype)
    rois = ROIS
    prob = torch.rand(7, 5, 6)
    sampling = Sampling((3, 3), (0.25,), 2, True)
    upstream = torch.randn(7, 6, 3, 3).to(dtype)
    plain = [tensor.clone().requires_grad_() for tensor in (features, prob)]
    wanted = align([plain[0]], rois, plain[1], sampling)
    if layout == "channels-last":
        others = [features.contiguous(memory_format=torch.channels_last), prob.clone()]
    elif layout == "strided":
        others, rois, upstream = [strided(features), strided(prob)], strided(rois), strided(upstream)
    else:
        others = [torch.stack([features] * 3, 2)[:, :, 1], prob.expand(2, 7, 5, 6)[1]]
    others = [tensor.detach().requires_grad_() for tensor in others]
    got = align([others[0]], rois, others[1], sampling)
    assert got.is_contiguous()
    assert torch.equal(got, wanted)
    grads = torch.autograd.grad(got, others, upstream)
    for left, right in zip(grads, torch.autograd.grad(wanted, plain, upstream), strict=True):
        assert torch.equal(left, right)


def test_gradient_that_is_expanded(align: Align) -> None:
    features = torch.randn(1, 3, 8, 8, requires_grad=True)
    output = align([features], ROIS, None, Sampling((2, 2), (0.25,), 2, True))
    (got,) = torch.autograd.grad(output, features, torch.tensor(2.0).expand_as(output), retain_graph=True)
    (wanted,) = torch.autograd.grad(output, features, torch.full_like(output, 2.0))
    assert torch.equal(got, wanted)


F, R, P = torch.zeros(1, 2, 4, 4), torch.zeros(3, 5), torch.zeros(3, 6, 6)


@pytest.mark.parametrize(
    ("features", "rois", "prob", "size", "error", "message"),
    [
        (F[0], R, P, 7, ValueError, r"features must be \[N, C, Hf, Wf\], got \[2, 4, 4\]"),
        (F, R[0], P, 7, ValueError, r"rois must be \[K, 5\], got \[5\]"),
        (F, R[:, :4], P, 7, ValueError, r"rois must be \[K, 5\] .* got \[3, 4\]"),
        (F, R, P[0], 7, ValueError, r"prob must be \[K, Hp, Wp\], got \[6, 6\]"),
        (F, R, P[:2], 7, ValueError, r"prob must be \[3, Hp, Wp\], a map for each RoI, got \[2, 6, 6\]"),
        (F, R, P[:, :0], 7, ValueError, r"got \[3, 0, 6\]"),
        (F, R, P, 0, ValueError, "output_size must be at least 1, got 0"),
        (F, R, P, (7, 7, 7), TypeError, r"output_size must be an int or \(H, W\), got \(7, 7, 7\)"),
        (F, R, P, 7.0, TypeError, r"output_size must be an int or \(H, W\), got 7.0"),
        (F, R, P, (7, -1), ValueError, r"output_size must be at least 1, got \(7, -1\)"),
        (F.int(), R, P, 7, TypeError, "features must be one of float32, .* got torch.int32"),
        (F, R.half(), P, 7, TypeError, "rois must be one of float32, float64, got torch.float16"),
        (F, R.long(), P, 7, TypeError, "rois must be one of float32, float64, got torch.int64"),
        (F, R, P.bool(), 7, TypeError, "prob must be one of .* got torch.bool"),
        (F, [[0, 1, 1, 2, 2]], P, 7, TypeError, "rois must be a tensor, got list"),
        ("F", R, P, 7, TypeError, "features must be a tensor, got str"),
        (F, R.to("meta"), P, 7, ValueError, "rois must be on cpu as the features are, got meta"),
        (F, R, P.to("meta"), 7, ValueError, "prob must be on cpu as the features are, got meta"),
    ],
)
def test_errors(features, rois, prob, size, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        sg_roi_align(features, rois, prob, size)


@pytest.mark.parametrize(
    ("features", "scales", "error", "message"),
    [
        (F, [1.0], TypeError, "features must be a list of tensors, finest first, got Tensor"),
        ([], [], ValueError, "features must have 1 to 8 levels, got 0"),
        ([F] * 9, [1.0] * 9, ValueError, "features must have 1 to 8 levels, got 9"),
        ([F, F], [1.0], ValueError, "spatial_scales must have one entry per level: 1 for 2 levels"),
        ([F, F.double()], [1.0, 0.5], TypeError, r"features\[1\] must be torch.float32 as features\[0\]"),
        ([F, F[:, :1]], [1.0, 0.5], ValueError, r"features\[1\] must be \[1, 2, Hf, Wf\] .* got \[1, 1, 4, 4\]"),
        ([F, F.to("meta")], [1.0, 0.5], ValueError, r"features\[1\] must be on cpu"),
        ([F, F], [1.0, 0.0], ValueError, r"spatial scales must be above 0, got \[1.0, 0.0\]"),
    ],
)
def test_errors_of_a_pyramid(features, scales, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        multiscale_sg_roi_align(features, R, P, 7, scales)
    with pytest.raises(ValueError, match="canonical_scale must be above 0, got 0"):
        multiscale_sg_roi_align([F], R, P, 7, [1.0], canonical_scale=0)


@pytest.mark.parametrize("ratio", [2.0, None])
def test_sampling_ratio_must_be_an_int(ratio: object) -> None:
    with pytest.raises(TypeError, match="sampling_ratio must be an int"):
        sg_roi_align(F, R, P, 7, sampling_ratio=ratio)  # type: ignore[arg-type]
