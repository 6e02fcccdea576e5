"""Frozen batch norm against `BatchNorm2d` in eval mode: values, gradients, dtypes, memory."""

import pytest
import torch
from torch import nn

from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.norm import FrozenBatchNorm2d, convolve_and_normalise, fold_norms
from dsg.model.network.resnet import ResNet


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_frozen_norm_equals_batch_norm_in_eval_mode(training, eps):
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(6, eps=eps).double().eval()
    reference.running_mean.normal_()
    reference.running_var.uniform_(0.5, 1.5)
    nn.init.uniform_(reference.weight, 0.3, 0.9)
    nn.init.normal_(reference.bias)
    reference.running_var[0] = 0  # a dead channel, as ImageNet weights have them
    norm = FrozenBatchNorm2d(6, eps=eps).double().train()
    norm.load_state_dict(reference.state_dict())  # with num_batches_tracked
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=training)

    torch.testing.assert_close(norm(x), reference(x), rtol=1e-12, atol=1e-12)
    if training:
        upstream = torch.randn(2, 6, 5, 7, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(norm(x), x, upstream)
        (expected,) = torch.autograd.grad(reference(x), x, upstream)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_frozen_norm_has_no_parameters_and_no_counter():
    norm = FrozenBatchNorm2d(4)
    assert not list(norm.parameters())
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    norm.load_state_dict(norm.state_dict())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_norm_keeps_dtype_and_memory_format(requires_grad, dtype, memory_format):
    norm = FrozenBatchNorm2d(8)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    x = torch.randn(2, 8, 6, 5).to(dtype).contiguous(memory_format=memory_format)
    x.requires_grad_(requires_grad)
    out = norm(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    # a few roundings of values below 8
    torch.testing.assert_close(out.float(), norm(x.float()), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_frozen_norm_keeps_no_feature_map_for_the_backward_pass():
    norm = FrozenBatchNorm2d(8)
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norm(x)
    assert sum(kept) <= 8  # the scale


def randomised(module: nn.Module) -> nn.Module:
    for norm in (part for part in module.modules() if isinstance(part, FrozenBatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.double().eval()


@pytest.mark.parametrize(("groups", "kernel", "stride"), [(1, 1, 1), (6, 3, 2), (2, 5, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_norm_in_the_convolution_equals_one_after_it(groups, kernel, stride, memory_format):
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 12, kernel, stride, kernel // 2, groups=groups, bias=False).double()
    norm = randomised(FrozenBatchNorm2d(12, eps=1e-3))
    convolution.to(memory_format=memory_format)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    with torch.no_grad():
        found = convolve_and_normalise(convolution, norm, x)
        torch.testing.assert_close(found, norm(convolution(x)), rtol=0, atol=1e-12)
        assert found.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backbone", [EfficientNetLite, lambda: ResNet(50)], ids=["lite0", "resnet50"])
def test_backbones_give_the_same_with_gradients_and_without(backbone):
    torch.manual_seed(0)
    network = randomised(backbone())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    after = network(images)
    assert after[-1].requires_grad
    with torch.no_grad():
        within = network(images)
    for one, other in zip(within, after, strict=True):
        assert float(other.detach().abs().max()) > 1e-3
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone", [EfficientNetLite, lambda: ResNet(50)], ids=["lite0", "resnet50"])
def test_folded_backbones_give_the_same(backbone):
    torch.manual_seed(0)
    network = randomised(backbone())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    wanted = [level.detach() for level in network(images)]
    fold_norms(network)
    assert not [module for module in network.modules() if isinstance(module, FrozenBatchNorm2d)]
    for one, other in zip(network(images), wanted, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-9, atol=1e-9)


def test_a_norm_that_follows_no_convolution_stays():
    torch.manual_seed(0)
    network = randomised(nn.Sequential(FrozenBatchNorm2d(4), nn.Conv2d(4, 6, 1), FrozenBatchNorm2d(6), nn.ReLU()))
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    wanted = network(x)
    fold_norms(network)  # nor does it go into one that has a bias
    assert isinstance(network[0], FrozenBatchNorm2d) and isinstance(network[2], FrozenBatchNorm2d)
    torch.testing.assert_close(network(x), wanted)
