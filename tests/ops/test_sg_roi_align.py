"""SgRoIAlign against a slow loop, numbers typed by hand, torchvision, and its own symmetries.

Each test runs on the compiled CPU kernel (where one is built) and on plain PyTorch.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsg.ops import MultiScaleSgRoIAlign, SgRoIAlign, _reference, _sampling, multiscale_sg_roi_align, sg_roi_align
from dsg.ops._sampling import Sampling

Align = Callable[..., Tensor]
SAMPLINGS = [1, 2, 0]


def slow_sg_roi_align(features: Tensor, rois: Tensor, prob: Tensor | None, sampling: Sampling) -> Tensor:
    """The formulas, one sampling point after the other; features [N, C, Hf, Wf] of one level."""
    (height, width), (scale,), ratio, aligned, *_ = sampling
    cells_y, cells_x = features.shape[2:]
    output = []
    for row, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        offset = 0.5 if aligned else 0.0
        top, left = scale * y1 - offset, scale * x1 - offset
        roi_height, roi_width = scale * (y2 - y1), scale * (x2 - x1)
        if not aligned:
            roi_height, roi_width = max(roi_height, 1.0), max(roi_width, 1.0)
        samples_y = ratio if ratio > 0 else math.ceil(roi_height / height)
        samples_x = ratio if ratio > 0 else math.ceil(roi_width / width)
        for bin_y in range(height):
            for bin_x in range(width):
                total = features.new_zeros(features.shape[1])
                for iy in range(samples_y):
                    for ix in range(samples_x):
                        u = (bin_y + (iy + 0.5) / samples_y) / height
                        v = (bin_x + (ix + 0.5) / samples_x) / width
                        a, b = top + u * roi_height, left + v * roi_width
                        if a < -1 or a > cells_y or b < -1 or b > cells_x:
                            continue
                        value = slow_bilinear(features[int(image)], a, b)
                        if prob is not None:
                            c, d = u * prob.shape[1] - 0.5, v * prob.shape[2] - 0.5
                            value = value * (1 + slow_bilinear(prob[row][None], c, d))
                        total = total + value
                output.append(total / max(samples_y * samples_x, 1))
    return torch.stack(output).view(len(rois), height, width, -1).permute(0, 3, 1, 2)


def slow_bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """image [C, H, W] at (y, x), clamped to it -> [C]"""
    y = min(max(y, 0.0), image.shape[1] - 1)
    x = min(max(x, 0.0), image.shape[2] - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, image.shape[1] - 1), min(x0 + 1, image.shape[2] - 1)
    dy, dx = y - y0, x - x0
    top = image[:, y0, x0] * (1 - dx) + image[:, y0, x1] * dx
    bottom = image[:, y1, x0] * (1 - dx) + image[:, y1, x1] * dx
    return top * (1 - dy) + bottom * dy


def random_rois(count: int, images: int, size: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Boxes in and around a square picture of `size` pixels: [count, 5]."""
    corner = torch.rand(count, 2, dtype=dtype) * size * 1.4 - size * 0.3
    extent = torch.rand(count, 2, dtype=dtype) ** 2 * size
    index = torch.randint(0, images, (count, 1)).to(dtype)
    return torch.cat([index, corner, corner + extent], 1)


def with_gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [output.detach(), *torch.autograd.grad(output, inputs, torch.randn(output.shape).to(output))]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", SAMPLINGS)
def test_equals_the_slow_loop(align: Align, ratio: int, aligned: bool, guided: bool) -> None:
    features = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    rois = random_rois(6, 2, 32.0)
    rois[0, 3:] = rois[0, 1:3] + 0.1  # far below a pixel
    prob = torch.rand(6, 5, 4, dtype=torch.float64, requires_grad=True) if guided else None
    sampling = Sampling((3, 2), (0.25,), ratio, aligned)
    inputs = (features,) if prob is None else (features, prob)
    got = with_gradients(align([features], rois, prob, sampling), *inputs)
    wanted = with_gradients(slow_sg_roi_align(features, rois, prob, sampling), *inputs)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_numbers_by_hand(align: Align) -> None:
    features = torch.arange(16.0).view(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    # One point per bin, at the corners of cells: the mean of four of them.
    plain = align([features], rois, None, Sampling((2, 2), (1.0,), 1, True))
    torch.testing.assert_close(plain, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    # The map has a cell for each bin, so every bin meets its own: times 1, 2, 1.5 and 1.25.
    prob = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    guided = align([features], rois, prob, Sampling((2, 2), (1.0,), 1, True))
    torch.testing.assert_close(guided, torch.tensor([[[[2.5, 9.0], [15.75, 15.625]]]]))


def test_half_pixel_places_in_the_map_by_hand(align: Align) -> None:
    features = torch.ones(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 0, 0, 4, 4]])
    prob = torch.tensor([[[0.0], [1.0]]])
    # Rows of points lie at -0.25, 0.25, 0.75 and 1.25 in the map: clamped, they read 0, 0.25, 0.75 and 1.
    output = align([features], rois, prob, Sampling((2, 1), (1.0,), 2, True))
    torch.testing.assert_close(output, torch.tensor([[[[1.125], [1.875]]]]))


def test_points_outside_the_picture_count_as_zero_by_hand(align: Align) -> None:
    features = torch.ones(1, 1, 4, 4)
    rois = torch.tensor([[0.0, -4, 0, 4, 4]])
    sampling = Sampling((1, 2), (1.0,), 1, True)  # points at x = -2.5 and 1.5
    torch.testing.assert_close(align([features], rois, None, sampling), torch.tensor([[[[0.0, 1.0]]]]))
    torch.testing.assert_close(align([features], rois, torch.ones(1, 3, 3), sampling), torch.tensor([[[[0.0, 2.0]]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", SAMPLINGS)
def test_without_a_map_it_is_torchvisions(align: Align, ratio: int, aligned: bool, dtype: torch.dtype) -> None:
    features = torch.randn(3, 37, 20, 26, dtype=dtype, requires_grad=True)
    rois = random_rois(40, 3, 90.0, dtype)
    got = with_gradients(align([features], rois, None, Sampling((5, 7), (0.25,), ratio, aligned)), features)
    theirs = torchvision.ops.roi_align(features, rois, (5, 7), 0.25, ratio, aligned)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    for left, right in zip(got, with_gradients(theirs, features), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ratio", SAMPLINGS)
def test_map_of_zeros_is_plain_and_of_ones_doubles(align: Align, ratio: int) -> None:
    features = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    rois = random_rois(9, 2, 48.0)
    sampling = Sampling((3, 3), (0.25,), ratio, True)
    plain = align([features], rois, None, sampling)
    ones = torch.ones(9, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(align([features], rois, 0 * ones, sampling), plain, rtol=0, atol=1e-13)
    torch.testing.assert_close(align([features], rois, ones, sampling), 2 * plain, rtol=0, atol=1e-12)


def test_scaling_picture_and_boxes_together_changes_nothing(align: Align) -> None:
    features = torch.randn(1, 2, 10, 10)
    rois = random_rois(8, 1, 40.0, torch.float32)
    larger = rois * torch.tensor([1.0, 4, 4, 4, 4])
    prob = torch.rand(8, 6, 6)
    small = align([features], rois, prob, Sampling((2, 2), (1 / 4,), 2, True))
    large = align([features], larger, prob, Sampling((2, 2), (1 / 16,), 2, True))
    torch.testing.assert_close(large, small, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("side", "level"),
    [(1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (5000, 3), (0, 0)],
)
def test_level_by_hand(align: Align, side: float, level: int) -> None:
    """Levels of strides 4 to 32: the levels 2 to 5, of which 224 pixels go to level 4."""
    features = [torch.full((1, 1, 8, 8), float(index)) for index in range(4)]
    low, high = 16 - side / 2, 16 + side / 2  # the one point lies in every level
    rois = torch.tensor([[0.0, low, low, high, high]])
    sampling = Sampling((1, 1), (1 / 4, 1 / 8, 1 / 16, 1 / 32), 1, True)
    # The number of a level is its value.
    assert align(features, rois, None, sampling).item() == level


def test_pyramid_is_torchvisions(align: Align) -> None:
    sizes = [(64, 48), (32, 24), (16, 12), (8, 6)]
    features = [torch.randn(2, 5, *size, dtype=torch.float64) for size in sizes]
    boxes = [random_rois(30, 1, 220.0)[:, 1:] for _ in range(2)]
    theirs = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 3, 2)(
        {str(index): level for index, level in enumerate(features)}, boxes, [(256, 192)] * 2
    )
    rois = torch.cat([torch.nn.functional.pad(box, (1, 0), value=image) for image, box in enumerate(boxes)])
    sampling = Sampling((3, 3), (1 / 4, 1 / 8, 1 / 16, 1 / 32), 2, False)
    torch.testing.assert_close(align(features, rois, None, sampling), theirs, rtol=1e-11, atol=1e-11)


def test_gradients_of_a_pyramid(align: Align) -> None:
    features = [torch.randn(1, 2, 8 >> i, 6 >> i, dtype=torch.float64, requires_grad=True) for i in range(3)]
    rois = random_rois(4, 1, 30.0)
    prob = torch.rand(4, 3, 2, dtype=torch.float64, requires_grad=True)
    sampling = Sampling((2, 1), (1 / 4, 1 / 8, 1 / 16), 2, True, 12.0, 3)
    assert torch.autograd.gradcheck(lambda prob, *levels: align(levels, rois, prob, sampling), (prob, *features))


@pytest.mark.parametrize("ratio", SAMPLINGS)
@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(align: Align, seed: int, ratio: int) -> None:
    torch.manual_seed(seed)
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    prob = torch.rand(4, 3, 5, dtype=torch.float64, requires_grad=True)
    rois = random_rois(4, 2, 12.0)
    sampling = Sampling((2, 2), (0.5,), ratio, True)
    assert torch.autograd.gradcheck(lambda *inputs: align([inputs[0]], rois, inputs[1], sampling), (features, prob))


@pytest.mark.parametrize("prob_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rois_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(align: Align, dtype: torch.dtype, rois_dtype: torch.dtype, prob_dtype: torch.dtype) -> None:
    """Sums are made in float32: what is lost is the rounding of inputs (given) and of the result (once)."""
    features = torch.randn(2, 5, 10, 10).to(dtype).requires_grad_()
    prob = torch.rand(6, 4, 4).to(prob_dtype).requires_grad_()
    rois = random_rois(6, 2, 40.0, rois_dtype)
    sampling = Sampling((2, 2), (0.25,), 2, True)
    output = align([features], rois, prob, sampling)
    assert output.dtype == dtype
    got = with_gradients(output, features, prob)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, prob_dtype]
    torch.manual_seed(1)
    upstream = torch.randn(output.shape).to(output).double()
    exact_inputs = [features.detach().double().requires_grad_(), prob.detach().double().requires_grad_()]
    exact = slow_sg_roi_align(exact_inputs[0], rois.double(), exact_inputs[1], sampling)
    wanted = [exact.detach(), *torch.autograd.grad(exact, exact_inputs, upstream)]
    for left, right in zip(got, wanted, strict=True):
        step = max(torch.finfo(left.dtype).eps, 1e-14 if dtype == torch.float64 else 2e-6)
        torch.testing.assert_close(left.double(), right, rtol=step, atol=step * right.abs().max().item())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([1, 3, 31, 32, 33, 70]),
    ratio=st.integers(-1, 3),
    aligned=st.booleans(),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_guidance_lies_between_one_and_two_and_implementations_agree(
    seed: int, channels: int, ratio: int, aligned: bool, size: tuple[int, int]
) -> None:
    torch.manual_seed(seed)
    features = [torch.rand(2, channels, 8 >> i, 8 >> i) for i in range(2)]
    rois, prob = random_rois(5, 2, 40.0, torch.float32), torch.rand(5, 3, 4)
    args = (size, [1 / 4, 1 / 8], ratio, aligned, 16, 3)
    plain = multiscale_sg_roi_align(features, rois, None, *args)
    guided = multiscale_sg_roi_align(features, rois, prob, *args)
    assert (guided >= plain * 0.9999 - 1e-5).all()
    assert (guided <= plain * 2.0001 + 1e-5).all()
    sampling = Sampling(size, (1 / 4, 1 / 8), ratio, aligned, 16, 3)
    # A point at the very edge of the picture may fall in or out by rounding: a bin may then differ.
    off = (guided - _reference.forward(features, rois, prob, sampling)).abs() > 1e-4
    assert off.float().mean() < 0.02


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, reference: Align) -> None:
    features = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    prob = torch.rand(9, 4, 4, dtype=torch.float64, requires_grad=True)
    rois = random_rois(9, 2, 32.0)
    sampling = Sampling((2, 2), (0.25,), 2, True)
    whole = with_gradients(reference([features], rois, prob, sampling), features, prob)
    monkeypatch.setattr(_sampling, "CHUNK_ELEMENTS", 100)
    parts = with_gradients(reference([features], rois, prob, sampling), features, prob)
    for left, right in zip(parts, whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


def test_threads_do_not_show(op: Align) -> None:
    features = torch.randn(2, 70, 16, 16, requires_grad=True)
    prob = torch.rand(50, 7, 7, requires_grad=True)
    rois = random_rois(50, 2, 64.0, torch.float32)
    sampling = Sampling((3, 3), (0.25,), 2, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(op([features], rois, prob, sampling), features, prob))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


def test_functions_and_modules_are_the_op(op: Align) -> None:
    features = [torch.randn(1, 2, 8 >> i, 8 >> i) for i in range(2)]
    rois, prob = random_rois(4, 1, 40.0, torch.float32), torch.rand(4, 6, 6)
    one = op(features[:1], rois, prob, Sampling((2, 3), (0.25,), 1, False))
    assert torch.equal(sg_roi_align(features[0], rois, prob, (2, 3), 0.25, 1, False), one)
    assert torch.equal(SgRoIAlign((2, 3), 0.25, 1, False)(features[0], rois, prob), one)
    many = op(features, rois, prob, Sampling((3, 3), (0.25, 0.125), 2, True, 20.0, 3))
    assert torch.equal(multiscale_sg_roi_align(features, rois, prob, 3, (0.25, 0.125), 2, True, 20, 3), many)
    assert torch.equal(MultiScaleSgRoIAlign(3, (0.25, 0.125), 2, True, 20, 3)(features, rois, prob), many)


def test_modules_say_what_they_do() -> None:
    assert repr(SgRoIAlign(7, 0.25)) == (
        "SgRoIAlign(output_size=7, spatial_scale=0.25, sampling_ratio=2, aligned=True)"
    )
    assert repr(MultiScaleSgRoIAlign(14, [0.25, 0.125])) == (
        "MultiScaleSgRoIAlign(output_size=14, spatial_scales=(0.25, 0.125), sampling_ratio=2, aligned=True, "
        "canonical_scale=224, canonical_level=4)"
    )
