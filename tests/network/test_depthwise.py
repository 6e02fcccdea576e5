"""Depthwise convolutions that a GPU runs in one kernel, and what stays float32 in half precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dsg.model.network.depthwise import depthwise_relu6, has_kernel
from dsg.model.network.efficientnet_lite import EfficientNetLite, InvertedResidual, depthwise_conv
from dsg.model.network.float32 import whole_float32
from dsg.model.network.norm import FrozenBatchNorm2d, fold_norms
from dsg.model.network.whole import Whole, WholeConv2d

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
CHANNELS_LAST = torch.channels_last


def layer(channels: int, kernel: int, stride: int) -> tuple[WholeConv2d, FrozenBatchNorm2d]:
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(channels, 1e-3)
    norm.weight.uniform_(0.5, 2)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.bias.normal_().add_(3)
    return depthwise_conv(channels, kernel, stride), norm


def in_steps(convolution: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layers one after another, in float64."""
    convolution, norm = nn.Sequential(convolution, norm).double()
    return functional.relu6(norm(convolution(functional.relu6(x.double()))))


@pytest.fixture
def spelled_out(monkeypatch):
    """The kernel in torch's own layers, so that what is written around it runs on a CPU."""

    def kernel(x, weight, bias, size, stride, out):
        channels = x.shape[1]
        by_channel = weight.t().view(channels, 1, size, size)
        whole = functional.relu6(x.float())
        out.copy_(functional.relu6(functional.conv2d(whole, by_channel, bias, stride, size // 2, 1, channels)))

    monkeypatch.setattr(torch.ops.dsg, "depthwise_relu6", kernel, raising=False)


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1)])
def test_what_the_kernel_is_given(spelled_out, is_folded, kernel, stride, size):
    convolution, norm = layer(16, kernel, stride)
    x = (4 * torch.randn(2, 16, *size)).contiguous(memory_format=CHANNELS_LAST)
    wanted = in_steps(*(nn.Sequential(*layer(16, kernel, stride))), x)
    if is_folded:
        both = nn.Sequential(convolution, norm)
        fold_norms(both)
        convolution, norm = both
        assert isinstance(norm, nn.Identity)
    with torch.no_grad():
        found = depthwise_relu6(convolution, norm, x, torch.float32)
    assert found.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(
    ("given", "wanted_type"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(2, 32, 40, 56), (3, 8, 7, 9), (1, 1152, 15, 20), (1, 16, 1, 1), (2, 24, 2, 3)])
def test_the_kernel(given, wanted_type, kernel, stride, shape):
    convolution, norm = layer(shape[1], kernel, stride)
    x = (4 * torch.randn(shape)).to(given).contiguous(memory_format=CHANNELS_LAST)
    wanted = in_steps(*(nn.Sequential(*layer(shape[1], kernel, stride))), x)
    on_gpu = nn.Sequential(convolution, norm).cuda().requires_grad_(False)
    own = x.cuda()
    assert has_kernel(on_gpu[0], own)
    found = depthwise_relu6(on_gpu[0], on_gpu[1], own, wanted_type)
    assert found.dtype == wanted_type and found.shape == wanted.shape
    tolerance = torch.finfo(wanted_type).eps
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=max(2 * tolerance, 1e-5))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_backbone_with_kernels_is_the_backbone(dtype):
    torch.manual_seed(0)
    backbone = EfficientNetLite(0).eval().requires_grad_(False)
    images = torch.randn(2, 3, 96, 160)
    wanted = backbone(images)
    fold_norms(backbone)
    own = backbone.to(dtype).to(memory_format=CHANNELS_LAST).cuda()
    with whole_float32():
        found = own(images.to(dtype).cuda().contiguous(memory_format=CHANNELS_LAST))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        error = (one.cpu().float() - other).norm() / other.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_and_float64_go_another_way():
    convolution, _ = layer(16, 3, 1)
    for x in (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4, dtype=torch.float64)):
        assert not has_kernel(convolution, x)


@pytest.mark.parametrize("narrow", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)])
def test_whole_parts_stay_wide(narrow):
    torch.manual_seed(0)
    block = InvertedResidual(16, 16, expand=4, kernel=5, stride=1, norm_eps=1e-3)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    narrow(block)
    assert block.expand_conv.weight.dtype in (torch.float16, torch.bfloat16)
    for part in (block.depthwise_conv, block.bn0, block.bn1, block.bn2):
        assert isinstance(part, Whole)
        assert all(tensor.dtype == torch.float32 for tensor in part.state_dict().values())
    for name in ("depthwise_conv.weight", "bn1.running_var"):
        assert torch.equal(block.state_dict()[name], before[name])
    block.double()
    assert all(tensor.dtype == torch.float64 for tensor in block.state_dict().values())


@pytest.mark.parametrize("is_folded", [False, True])
def test_rounded_weights_do_not_enter_a_depthwise_convolution(is_folded):
    """Weights that nearly cancel out, as those of an edge: of what they give, their rounding would be most."""
    torch.manual_seed(0)
    block = InvertedResidual(16, 8, expand=1, kernel=3, stride=1, norm_eps=0.0).eval().requires_grad_(False)
    block.depthwise_conv.weight.normal_(std=0.01)
    block.depthwise_conv.weight[:, :, 1, 0] += 100.02
    block.depthwise_conv.weight[:, :, 1, 2] -= 100.02
    block.project_conv.weight.copy_(block.project_conv.weight.half())
    x = torch.full((1, 16, 12, 12), 3.0) + 0.02 * torch.rand(1, 16, 12, 12)
    wanted = block(x)
    if is_folded:
        fold_norms(block)
    block.half()
    found = block(x)  # float32, as the stem gives it
    assert found.dtype == torch.float16
    assert (found.float() - wanted).norm() / wanted.norm() < 1e-3
    block.depthwise_conv.weight.copy_(block.depthwise_conv.weight.half())
    assert (block(x).float() - wanted).norm() / wanted.norm() > 0.01
