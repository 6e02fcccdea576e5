"""float32 without TF32: what torch's switches say inside and after."""

import pytest
import torch

from dsg.model.network.float32 import whole_float32


@pytest.mark.parametrize("before", [True, False])
def test_the_switch_is_off_inside_and_as_it_was_after(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with pytest.raises(ZeroDivisionError), whole_float32():
        assert torch.backends.cudnn.conv.fp32_precision != "tf32" and not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_user_who_asked_for_whole_float32_by_its_newer_name() -> None:
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        with whole_float32():
            assert convolutions.fp32_precision == "ieee"
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # TorchScript is deprecated
def test_a_trace_writes_down_that_it_is_off() -> None:
    convolution = torch.nn.Conv2d(1, 1, 1)
    with whole_float32():
        graph = torch.jit.trace(convolution, torch.rand(1, 1, 2, 2)).inlined_graph
    (node,) = graph.findAllNodes("aten::_convolution", recurse=True)
    assert list(node.inputs())[-1].toIValue() is False
