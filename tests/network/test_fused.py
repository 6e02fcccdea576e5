"""Fused layers against the plain ones: what a GPU runs in half precision must be the same network."""

import pytest
import torch
from torch.nn import functional

from dsg.model.network import fused, heads, rpn
from dsg.model.network.batch import normalise
from dsg.model.network.build import build
from dsg.model.network.fpn import FeaturePyramid
from dsg.model.network.heads import BoxHead, Fusion, MaskHead
from dsg.model.network.norm import FrozenBatchNorm2d, convolve_normalise_relu, fold_norms
from dsg.model.network.rpn import RPNHead

IS_FUSED = fused.is_fused
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture
def products(monkeypatch):
    """Switches the products of matrices on, which any device can run."""

    def switch(on: bool) -> None:
        for room in (heads, rpn):
            monkeypatch.setattr(room, "is_fused", lambda x: on)

    return switch


@pytest.fixture
def kernels(monkeypatch):
    """cuDNN's fused kernels spelled out, so that what is written around them runs on a CPU."""

    def convolve(x, weight, bias, stride, padding, dilation, groups):
        return functional.relu(functional.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def convolve_and_add(x, weight, other, alpha, bias, stride, padding, dilation, groups):
        return functional.relu(functional.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * other)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolve)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolve_and_add)

    def switch(on: bool) -> None:
        for room in (fused, heads, rpn):
            monkeypatch.setattr(room, "is_fused", lambda x: on)

    return switch


def gradients(module, call, *inputs):
    """The result of a call and the gradients of a weighted sum of it, for the inputs and all parameters."""
    module.zero_grad()
    inputs = [one.detach().clone(memory_format=torch.preserve_format).requires_grad_() for one in inputs]
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    total = sum((one * torch.rand(one.shape, generator=generator, dtype=one.dtype)).sum() for one in results)
    total.backward()
    return [*results, *(one.grad for one in inputs), *(one.grad.clone() for one in module.parameters())]


def assert_same_training(module, call, switch, *inputs):
    switch(False)
    wanted = gradients(module, call, *inputs)
    switch(True)
    found = gradients(module, call, *inputs)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_kernel_has_the_gradients_of_the_layers(kernels, stride):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(8, 16, 3, stride, padding=1).double()
    x, other = features(2, 8, 6), features(2, 16, 6 // stride)
    assert_same_training(convolution, lambda x: fused.convolve_relu(convolution, x), kernels, x)
    assert_same_training(convolution, lambda x, z: fused.convolve_relu(convolution, x, z), kernels, x, other)


def test_a_frozen_norm_in_the_kernel_has_the_gradients_of_the_layers(kernels):
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, bias=False), FrozenBatchNorm2d(16)).double()
    block[1].weight.uniform_(0.5, 1.5)
    block[1].bias.normal_()
    x, other = features(2, 8, 6), features(2, 16, 4)
    assert_same_training(block, lambda x: convolve_normalise_relu(*block, x), kernels, x)
    assert_same_training(block, lambda x, z: convolve_normalise_relu(*block, x, z), kernels, x, other)


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_mask_head_in_products_trains_as_in_layers(kernels, outputs):
    torch.manual_seed(0)
    head = MaskHead(8, outputs).double().train()
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.deconv.bias)
    assert_same_training(head, head, kernels, features(3, 8, 4))


def test_a_box_head_in_products_trains_as_in_layers(kernels):
    torch.manual_seed(0)
    head = BoxHead(8, 5, 16, 4).double().train()
    assert_same_training(head, head, kernels, features(6, 8, 5))


@pytest.mark.parametrize("at_zero", [False, True])
def test_a_fusion_in_one_kernel_trains_as_in_layers_and_leaves_zero(kernels, at_zero):
    torch.manual_seed(0)
    fusion = Fusion(8, 3, activation=True).double().train()
    torch.nn.init.normal_(fusion.conv.bias)
    if at_zero:
        torch.nn.init.zeros_(fusion.conv.weight)
        torch.nn.init.zeros_(fusion.conv.bias)
    assert_same_training(fusion, fusion, kernels, features(3, 8, 4), features(3, 8, 8))
    assert float(fusion.conv.weight.grad.abs().max()) > 0


def test_lateral_convolutions_as_products_train_as_in_layers(kernels):
    torch.manual_seed(0)
    pyramid = FeaturePyramid([8, 16], 8).double().train()
    levels = [features(2, 8, 8), features(2, 16, 4)]
    assert_same_training(pyramid, lambda *levels: tuple(pyramid(levels)), kernels, *levels)


def features(count: int, channels: int, side: int) -> torch.Tensor:
    return torch.randn(count, channels, side, side, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_masks_by_products_are_those_of_the_layers(products, monkeypatch, outputs, with_labels, count):
    torch.manual_seed(0)
    monkeypatch.setattr(heads, "_ROIS_AT_ONCE", 3)  # several parts, the last one smaller
    head = MaskHead(8, outputs).double().eval()
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.predictor.bias)
    torch.nn.init.normal_(head.deconv.bias)
    labels = torch.randint(0, 5, (count,)) if with_labels else None
    given = features(count, 8, 6)
    products(False)
    wanted, wanted_hidden = head(given, labels)
    products(True)
    found, hidden = head(given, labels)
    assert found.shape == (count, 1 if with_labels else outputs, 12, 12)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(hidden, wanted_hidden)


@torch.no_grad()
def test_boxes_by_products_are_those_of_the_layers(products):
    torch.manual_seed(0)
    head = BoxHead(8, 5, 16, 4).double().eval()
    given = features(6, 8, 5)
    products(False)
    wanted = head(given)
    products(True)
    for found, expected in zip(head(given), wanted, strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("anchors", [3, 8])
def test_rpn_by_products_is_that_of_the_layers(products, anchors):
    torch.manual_seed(0)
    head = RPNHead(8, anchors, depth=2).eval()
    levels = [features(2, 8, side).float() for side in (6, 3)]
    products(False)
    wanted = head(levels)
    products(True)
    for found, expected in zip(head(levels), wanted, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@GPU
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_kernel_gives_what_the_layers_give(dtype, stride):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(64, 128, 3, stride, padding=1).to("cuda", dtype, memory_format=torch.channels_last)
    x = torch.randn(3, 64, 20, 24, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    exact = convolution.float()
    plain = exact(x.float())
    other = torch.randn_like(plain).to(dtype)
    convolution.to(dtype)
    # Memory that is given out again may hold anything, and nothing of it may come through.
    del_me = torch.full((1 << 24,), float("nan"), device="cuda", dtype=dtype)
    del del_me
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    found = fused.convolve_relu(convolution, x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), functional.relu(plain), **tolerance)
    added = fused.convolve_relu(convolution, x, other)
    torch.testing.assert_close(added.float(), functional.relu(plain + other.float()), **tolerance)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("preset", ["mask_rcnn_r50_fpn", "dsg_r50_fpn"])
def test_a_step_in_half_precision_has_the_losses_and_gradients_of_the_plain_one(preset, monkeypatch):
    torch.manual_seed(0)
    model = build(preset, num_classes=3).train().cuda().to(memory_format=torch.channels_last)
    images = [torch.rand(3, 128, 160, device="cuda") for _ in range(2)]
    masks = torch.zeros(1, 128, 160, dtype=torch.uint8, device="cuda")
    masks[:, 20:90, 30:100] = 1
    box = torch.tensor([[30.0, 20.0, 100.0, 90.0]], device="cuda")
    targets = [{"boxes": box, "labels": torch.tensor([2], device="cuda"), "masks": masks} for _ in images]

    def step(on: bool):
        for room in (fused, heads, rpn):
            monkeypatch.setattr(room, "is_fused", IS_FUSED if on else lambda x: False)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16):
            losses = model(images, targets)
        sum(losses.values()).backward()
        grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        return {name: float(one.detach()) for name, one in losses.items()}, grads

    wanted, wanted_grads = step(False)
    found, grads = step(True)
    assert found == pytest.approx(wanted, rel=0.05, abs=0.01)
    assert grads.keys() == wanted_grads.keys()
    for name, one in wanted_grads.items():
        assert grads[name].dtype == torch.float32
        near = functional.cosine_similarity(grads[name].flatten(), one.flatten(), dim=0)
        assert float(one.norm()) < 1e-6 or float(near) > 0.9, name


@pytest.mark.gpu
@GPU
@torch.no_grad()
@pytest.mark.parametrize("preset", ["mask_rcnn_r50_fpn", "dsg_r50_fpn", "dsg_lite0_fpn", "cascade_dsg_lite0_fpn"])
def test_a_network_in_half_precision_gives_the_levels_of_the_plain_one(preset):
    torch.manual_seed(0)
    model = build(preset, num_classes=3).eval().cuda()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.4, 0.8)
            module.bias.normal_(std=0.1)
    images = torch.rand(2, 3, 128, 160, device="cuda")
    sizes = torch.tensor([[128, 160], [100, 150]], device="cuda")
    wanted = model._pyramid(images, sizes)
    logits, deltas = model.rpn_head(wanted)
    fold_norms(model)
    model.half().to(memory_format=torch.channels_last)
    found = model._pyramid(images.half(), sizes)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.01 * float(other.abs().max()))
    for ours, theirs in zip(model.rpn_head(found), (logits, deltas), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_a_norm_that_was_folded_leaves_one_convolution():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, bias=False), FrozenBatchNorm2d(6)).double()
    block[1].weight.uniform_(0.5, 1.5)
    block[1].bias.normal_()
    x, other = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 6, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = functional.relu(block[1](block[0](x)) + other)
        torch.testing.assert_close(convolve_normalise_relu(block[0], block[1], x, other.clone()), wanted)
        fold_norms(block)
        torch.testing.assert_close(convolve_normalise_relu(block[0], block[1], x, other.clone()), wanted)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_normalised_in_one_pass_as_in_many(dtype):
    torch.manual_seed(0)
    batch = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 70], [1, 1]])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    wanted = normalise(batch, sizes, mean, std, dtype)
    found = normalise(batch.cuda(), sizes.cuda(), mean.cuda(), std.cuda(), dtype)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == dtype
    torch.testing.assert_close(found.cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rois", "channels", "side", "step"), [(300, 256, 7, 2), (5, 8, 3, 3), (0, 16, 7, 2)])
def test_pooled_features_are_added_in_one_pass(dtype, rois, channels, side, step):
    torch.manual_seed(0)
    given = [torch.randn(rois, channels, side * factor, side * factor, device="cuda") for factor in (1, step)]
    x, finer = (one.to(dtype).contiguous(memory_format=torch.channels_last) for one in given)
    with torch.no_grad():
        found = fused.add_pooled(x, finer, step)
    wanted = x.double() + functional.avg_pool2d(finer.double(), step)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_without_a_gpu_they_are_added_in_two():
    x, finer = torch.randn(3, 8, 2, 2), torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(fused.add_pooled(x, finer, 2), x + functional.avg_pool2d(finer, 2))
