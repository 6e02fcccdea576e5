"""The CUDA kernels: against float64 on the CPU, and against what PyTorch's own arithmetic loses on the GPU."""

import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from dsg.ops import _reference, kernel_name, multiscale_sg_roi_align, sg_roi_align
from dsg.ops._sampling import Sampling

pytestmark = pytest.mark.gpu

OPS = torch.ops.dsg
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SCALES = (1 / 4, 1 / 8, 1 / 16)
CANONICAL = (60.0, 3)


def scene(channels: int, dtype: torch.dtype, count: int = 40) -> tuple[list[Tensor], Tensor, Tensor]:
    """Three levels of two pictures of 120 x 152 pixels, RoIs in and around them (on the CPU), and their maps."""
    features = [torch.randn(2, channels, -(-120 >> 2 + i), -(-152 >> 2 + i)).abs().to(dtype) for i in range(3)]
    corner = torch.rand(count, 2) * torch.tensor([170.0, 140.0]) - 20
    extent = torch.rand(count, 2) ** 2 * 120 + 0.5
    rois = torch.cat([torch.randint(0, 2, (count, 1)).float(), corner, corner + extent], 1)
    return features, rois, torch.rand(count, 9, 6).to(dtype)


def run(
    features: list[Tensor], rois: Tensor, prob: Tensor | None, sampling: Sampling, upstream: Tensor
) -> list[Tensor]:
    """Output, gradient of the map (empty without one), gradients of the levels: through the registered op."""
    (height, width), scales, *rest = sampling
    args = (rois, prob, height, width, list(scales), *rest)
    output = OPS.multiscale_sg_roi_align(features, *args)
    flags = (True, prob is not None, False)
    grads, grad_prob = OPS.multiscale_sg_roi_align_backward(upstream.to(output), features, *args, *flags)
    return [output, grad_prob, *grads]


def run_reference(
    features: list[Tensor], rois: Tensor, prob: Tensor | None, sampling: Sampling, upstream: Tensor
) -> list[Tensor]:
    output = _reference.forward(features, rois, prob, sampling)
    flags = (True, prob is not None, False)
    grads, grad_prob = _reference.backward(upstream.to(output), features, rois, prob, sampling, *flags)
    return [output, grad_prob, *grads]


def worst(result: Tensor, exact: Tensor) -> float:
    return (result.double().cpu() - exact).abs().max().item() if exact.numel() else 0.0


def test_cuda_kernel_is_what_runs() -> None:
    assert "cuda" in kernel_name()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 70, 24, 256])
def test_loses_no_more_than_pytorch(
    channels: int, dtype: torch.dtype, ratio: int, guided: bool, layout: torch.memory_format
) -> None:
    """At most twice the error of the same formulas in plain PyTorch at this dtype on this GPU."""
    features, rois, prob = scene(channels, dtype)
    sampling = Sampling((5, 7), SCALES, ratio, True, *CANONICAL)
    upstream = torch.randn(len(rois), channels, 5, 7).to(dtype)
    exact = run_reference(
        [level.double() for level in features],
        rois.double(),
        prob.double() if guided else None,
        sampling,
        upstream.double(),
    )
    on_gpu = (
        [level.cuda().contiguous(memory_format=layout) for level in features],
        rois.cuda(),
        prob.cuda() if guided else None,
        sampling,
        upstream.cuda(),
    )
    results = run(*on_gpu)
    assert results[0].is_contiguous(memory_format=layout)  # laid out as the features are
    for got, plain, wanted in zip(results, run_reference(*on_gpu), exact, strict=True):
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
        assert got is results[0] or got.stride() == plain.stride()
        slack = wanted.abs().max().item() * (1e-15 if dtype == torch.float64 else 1e-6) if wanted.numel() else 0.0
        assert worst(got, wanted) <= 2 * worst(plain, wanted) + slack


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 0])
def test_without_a_map_it_is_torchvisions(ratio: int, aligned: bool) -> None:
    (features, *_), rois, _ = scene(17, torch.float64)
    features, rois = features.cuda().requires_grad_(), rois.double().cuda()
    upstream = torch.randn(len(rois), 17, 4, 3, dtype=torch.float64, device="cuda")
    results = []
    for output in (
        sg_roi_align(features, rois, None, (4, 3), 0.25, ratio, aligned),
        torchvision.ops.roi_align(features, rois, (4, 3), 0.25, ratio, aligned),
    ):
        results.append([output, *torch.autograd.grad(output, features, upstream)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prob_dtype", DTYPES)
@pytest.mark.parametrize("rois_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes_equal_the_cpu(dtype: torch.dtype, rois_dtype: torch.dtype, prob_dtype: torch.dtype) -> None:
    features, rois, prob = scene(5, dtype, 12)
    rois, prob = rois.to(rois_dtype), prob.to(prob_dtype)
    sampling = Sampling((3, 3), SCALES, 2, True, *CANONICAL)
    upstream = torch.randn(12, 5, 3, 3)
    on_cpu = run(features, rois, prob, sampling, upstream)
    on_gpu = run([level.cuda() for level in features], rois.cuda(), prob.cuda(), sampling, upstream.cuda())
    for got, wanted in zip(on_gpu, on_cpu, strict=True):
        assert got.dtype == wanted.dtype
        step = max(torch.finfo(got.dtype).eps, 1e-12 if dtype == torch.float64 else 1e-5)
        torch.testing.assert_close(got.cpu(), wanted, rtol=2 * step, atol=step * wanted.abs().max().item())


@pytest.mark.parametrize("ratio", [2, 0])
def test_gradcheck(ratio: int) -> None:
    features = [torch.randn(2, 2, 8 >> i, 6 >> i, dtype=torch.float64).cuda().requires_grad_() for i in range(2)]
    prob = torch.rand(4, 3, 4, dtype=torch.float64).cuda().requires_grad_()
    rois = torch.tensor([[0, 1, 2, 13, 11], [1, 0, 0, 30, 28], [0, 3, 3, 2, 2], [7, 0, 0, 4, 4]]).double().cuda()
    assert torch.autograd.gradcheck(
        lambda prob, *levels: multiscale_sg_roi_align(levels, rois, prob, (2, 3), (0.5, 0.25), ratio, True, 12, 1),
        (prob, *features),
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format) -> None:
    features, rois, prob = scene(3, torch.float32, 6)
    levels = [level.cuda().contiguous(memory_format=layout).requires_grad_() for level in features]
    rois, prob = rois.cuda(), prob.cuda().requires_grad_()
    one = (2, 3, 0.25, 2, True)
    many = (2, 3, list(SCALES), 2, True, *CANONICAL)
    grad = torch.randn(6, 3, 2, 3, device="cuda")
    torch.library.opcheck(OPS.sg_roi_align.default, (levels[0], rois, prob, *one))
    torch.library.opcheck(OPS.multiscale_sg_roi_align.default, (levels, rois, prob, *many))
    levels, prob = [level.detach() for level in levels], prob.detach()
    for flags in ((True, True, False), (True, False, True), (False, True, False)):
        torch.library.opcheck(OPS.sg_roi_align_backward.default, (grad, levels[0], rois, prob, *one, *flags))
        torch.library.opcheck(OPS.multiscale_sg_roi_align_backward.default, (grad, levels, rois, prob, *many, *flags))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_is_bit_equal_over_runs(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Many RoIs on the same cells, so that any order left to chance would show."""
    features, rois, prob = scene(32, dtype, 600)
    levels = [level.cuda().contiguous(memory_format=layout).requires_grad_() for level in features]
    rois, prob = rois.cuda(), prob.cuda().requires_grad_()
    upstream = torch.randn(600, 32, 7, 7, device="cuda").to(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(4):
            output = multiscale_sg_roi_align(levels, rois, prob, 7, SCALES, 2, True, *CANONICAL)
            runs.append([output, *torch.autograd.grad(output, (prob, *levels), upstream)])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(left, right) for left, right in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("ratio", [1, 2, 0])
@pytest.mark.parametrize(
    "bad",
    [
        [0, math.nan, 1, 5, 5],
        [0, 1, 1, math.inf, 5],
        [0, 1, -math.inf, 3, 5],
        [2, 1, 1, 5, 5],
        [-1, 1, 1, 5, 5],
        [1e30, 1, 1, 5, 5],
        [math.nan, 1, 1, 5, 5],
        [0.5, 1, 1, 5, 5],
    ],
)
def test_bad_roi_gives_zeros_and_no_gradient(bad: list[float], ratio: int) -> None:
    features = torch.randn(2, 3, 6, 6, device="cuda", requires_grad=True)
    prob = torch.rand(2, 4, 4, device="cuda", requires_grad=True)
    good = [1.0, 1.5, 2, 9, 8]
    output = sg_roi_align(features, torch.tensor([bad, good], device="cuda"), prob, 2, 0.5, ratio)
    alone = sg_roi_align(features, torch.tensor([good], device="cuda"), prob[1:], 2, 0.5, ratio)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.equal(output[1], alone[0])
    upstream = torch.ones(2, 3, 2, 2, device="cuda")
    upstream[0] = math.nan
    grad_features, grad_prob = torch.autograd.grad(output, (features, prob), upstream)
    (grad_alone,) = torch.autograd.grad(alone, features, upstream[1:])
    torch.testing.assert_close(grad_features, grad_alone, rtol=1e-6, atol=1e-6)
    assert not grad_prob[0].any()
    assert grad_prob[1].abs().sum() > 0


@pytest.mark.parametrize("ratio", [2, 0])
def test_absurd_but_finite_boxes_end(ratio: int) -> None:
    features = torch.randn(1, 2, 6, 6, device="cuda", requires_grad=True)
    prob = torch.rand(4, 3, 3, device="cuda", requires_grad=True)
    rois = torch.tensor(
        [[0, -1e30, -1e30, 1e30, 1e30], [0, 3e38, 0, 3e38, 5], [0, 0, 0, 1e8, 2], [0, 5, 5, -1e20, -1e20]]
    )
    output = sg_roi_align(features, rois.cuda(), prob, 2, 0.5, ratio)
    assert output.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (features, prob)))


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("channels", [0, 4])
def test_empty(channels: int, count: int, images: int) -> None:
    features = [torch.randn(images, channels, 8 >> i, 8 >> i, device="cuda", requires_grad=True) for i in range(2)]
    prob = torch.rand(count, 4, 4, device="cuda", requires_grad=True)
    rois = torch.tensor([0.0, 1, 1, 9, 9], device="cuda").expand(count, 5)
    output = multiscale_sg_roi_align(features, rois, prob, (2, 3), (0.5, 0.25))
    assert output.shape == (count, channels, 2, 3)
    grads = torch.autograd.grad(output.sum(), (*features, prob))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in (*features, prob)]
    if 0 in (count, images, channels):
        assert all(not tensor.any() for tensor in (output, *grads))


def test_strided_inputs_equal_contiguous_ones() -> None:
    features, rois, prob = scene(6, torch.float32, 9)
    sampling = Sampling((3, 2), SCALES, 2, True, *CANONICAL)
    upstream = torch.randn(9, 6, 3, 2).cuda()
    rois = rois.cuda()
    levels, prob = [level.cuda() for level in features], prob.cuda()
    wanted = run(levels, rois, prob, sampling, upstream)
    got = run(
        [torch.stack([level] * 2, 4)[..., 1] for level in levels],
        torch.stack([rois] * 2, 2)[..., 0],
        torch.stack([prob] * 3, 1)[:, 2],
        sampling,
        torch.stack([upstream] * 2, 1)[:, 1],
    )
    assert all(torch.equal(left, right) for left, right in zip(got, wanted, strict=True))
    expanded = torch.tensor(0.5, device="cuda").expand(9, 6, 3, 2)
    left, right = (run(levels, rois, prob, sampling, grad) for grad in (expanded, expanded.contiguous()))
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_runs_on_the_current_stream() -> None:
    """The inputs are written by a long queue on another stream: a kernel on the wrong one reads them too early."""
    features = torch.zeros(1, 64, 200, 200, device="cuda")
    rois = torch.tensor([[0.0, 10, 10, 300, 300]], device="cuda").repeat(64, 1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        features.fill_(1.0)
        features.requires_grad_()
        output = sg_roi_align(features, rois, None, 7, 0.5)
        (grad,) = torch.autograd.grad(output, features, torch.ones_like(output))
    stream.synchronize()
    torch.testing.assert_close(output, torch.ones_like(output))
    assert grad.double().sum().item() == pytest.approx(64 * 64 * 49, rel=1e-4)


def kernels_of(function: Callable[[], object]) -> list[str]:
    """Names of the kernels, fills and copies that a call runs on the GPU."""
    for _ in range(2):  # the first time prepares the op, and the profiler itself
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # The profiler's own doings (buffers, lazy loading, waits) are listed beside them, and have no C++ names.
    return [event.name for event in events if "::" in event.name or event.name.startswith(("Memset", "Memcpy"))]


# torch 2.11 says so once a process, whatever one does with the events
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pyramid_is_one_launch(dtype: torch.dtype) -> None:
    features, rois, prob = scene(8, dtype)
    levels, rois, prob = [level.cuda() for level in features], rois.cuda(), prob.cuda()
    many = (7, 7, list(SCALES), 2, True, *CANONICAL)
    grad = torch.ones(len(rois), 8, 7, 7, device="cuda", dtype=dtype)
    forward = kernels_of(lambda: OPS.multiscale_sg_roi_align(levels, rois, prob, *many))
    assert len(forward) == 1, forward
    assert "dsg::" in forward[0] and "forward_kernel" in forward[0]
    flags = (True, False, False)
    backward = kernels_of(lambda: OPS.multiscale_sg_roi_align_backward(grad, levels, rois, prob, *many, *flags))
    assert len(backward) == 1, backward
    assert "dsg::" in backward[0] and "backward_features_kernel" in backward[0]


def test_autocast_runs_in_the_dtype_of_the_features() -> None:
    features = torch.randn(1, 2, 80, 80, device="cuda")
    rois = torch.tensor([[0.0, 257.25, 258.75, 300.25, 301.5]], device="cuda")
    prob = torch.rand(1, 4, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        cast = sg_roi_align(features, rois, prob, 2, 0.25)
        low = sg_roi_align(features.bfloat16(), rois, prob, 2, 0.25)
    assert torch.equal(cast, sg_roi_align(features, rois, prob, 2, 0.25))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), cast, rtol=2e-2, atol=2e-2)


def test_tensors_on_two_devices_are_an_error() -> None:
    features, rois, prob = torch.zeros(1, 2, 4, 4), torch.zeros(1, 5), torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match="rois must be on cuda:0 as the features are, got cpu"):
        sg_roi_align(features.cuda(), rois, prob.cuda(), 2)
    with pytest.raises(ValueError, match="prob must be on cuda:0 as the features are, got cpu"):
        sg_roi_align(features.cuda(), rois.cuda(), prob, 2)


def test_more_elements_than_32_bits_count() -> None:
    """The last element of the output lies beyond 2 ** 31."""
    features = torch.randn(1, 2048, 4, 4, device="cuda", dtype=torch.float16)
    count = 2**31 // (2048 * 16) + 2
    rois = torch.tensor([[0.0, 0, 0, 4, 4]], device="cuda").repeat(count, 1)
    output = sg_roi_align(features, rois, None, 4)
    assert output.numel() > 2**31
    assert torch.equal(output[-1], output[0])
