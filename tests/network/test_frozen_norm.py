"""Frozen batch norm against `BatchNorm2d` in eval mode: values, gradients, dtypes, memory."""

import pytest
import torch
from torch import nn

from dsg.model.network.norm import FrozenBatchNorm2d


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
