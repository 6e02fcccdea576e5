"""torch.ops.dsg.*: schemas, fakes, autograd and autocast, as PyTorch's own checks and compilers see them."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsg.ops import MultiScaleSgRoIAlign, SgRoIAlign, sg_roi_align

ROIS = torch.tensor([[0, 1.0, 2, 13, 11], [1, 0, 0, 30, 28], [0, 3, 3, 2, 2], [7, 0, 0, 4, 4]])
ONE = (2, 3, 0.5, 2, True)
MANY = (2, 3, [0.5, 0.25], 2, True, 12.0, 1)
OPS = torch.ops.dsg


def feature_levels(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, 8 >> i, 6 >> i, dtype=dtype, requires_grad=requires_grad) for i in range(2)]


def maps(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(4, 3, 4, dtype=dtype, requires_grad=requires_grad)


# opcheck itself looks at .grad of the copies that it makes of its arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("guided", [True, False])
def test_opcheck_forward(guided: bool, layout: torch.memory_format) -> None:
    prob = maps(True) if guided else None
    levels = [level.contiguous(memory_format=layout).requires_grad_() for level in feature_levels()]
    torch.library.opcheck(OPS.sg_roi_align.default, (levels[0], ROIS, prob, *ONE))
    torch.library.opcheck(OPS.multiscale_sg_roi_align.default, (levels, ROIS, prob, *MANY))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needed: tuple[bool, bool], layout: torch.memory_format) -> None:
    levels = [level.contiguous(memory_format=layout) for level in feature_levels()]
    grad = torch.randn(4, 3, 2, 3)
    torch.library.opcheck(OPS.sg_roi_align_backward.default, (grad, levels[0], ROIS, maps(), *ONE, *needed, False))
    torch.library.opcheck(
        OPS.multiscale_sg_roi_align_backward.default, (grad, levels, ROIS, maps(), *MANY, *needed, True)
    )


def test_opcheck_backward_without_a_map() -> None:
    grad = torch.randn(4, 3, 2, 3)
    args = (grad, feature_levels(), ROIS, None, *MANY, True, False, False)
    torch.library.opcheck(OPS.multiscale_sg_roi_align_backward.default, args)
    assert OPS.multiscale_sg_roi_align_backward(*args)[1].numel() == 0


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck_of_the_public_function(seed: int) -> None:
    torch.manual_seed(seed)
    features, prob = feature_levels(True, torch.float64)[0], maps(True, torch.float64)
    assert torch.autograd.gradcheck(
        lambda features, prob: sg_roi_align(features, ROIS.double(), prob, (2, 3), 0.5), (features, prob)
    )


def test_only_gradients_that_are_needed() -> None:
    levels, prob = feature_levels(), maps(True)
    levels[1].requires_grad_()
    output = OPS.multiscale_sg_roi_align(levels, ROIS, prob, *MANY)
    output.sum().backward()
    assert levels[0].grad is None
    assert levels[1].grad is not None
    assert prob.grad is not None
    assert not OPS.multiscale_sg_roi_align(feature_levels(), ROIS, maps(), *MANY).requires_grad


def test_rois_get_no_gradient() -> None:
    rois = ROIS.clone().requires_grad_()
    features = feature_levels(True)[0]
    OPS.sg_roi_align(features, rois, None, *ONE).sum().backward()
    assert rois.grad is None


def test_double_backward_is_refused() -> None:
    features, prob = feature_levels(True)[0], maps(True)
    output = OPS.sg_roi_align(features, ROIS, prob, *ONE)
    (grad,) = torch.autograd.grad(output.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="SgRoIAlign has no second derivative"):
        grad.sum().backward()


def test_deterministic_mode_reaches_the_op() -> None:
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is OPS.sg_roi_align_backward.default:
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    features = feature_levels(True)[0]
    for deterministic in (True, False):
        output = OPS.sg_roi_align(features, ROIS, None, *ONE)
        torch.use_deterministic_algorithms(deterministic)
        try:
            with Spy():
                output.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_leaves_features_and_rois_alone(dtype: torch.dtype) -> None:
    """257.25 is no bfloat16: a RoI that was cast down would read elsewhere."""
    features = torch.randn(1, 2, 80, 80).to(dtype)
    rois = torch.tensor([[0.0, 257.25, 258.75, 300.25, 301.5]])
    prob = torch.rand(1, 4, 4)
    plain = sg_roi_align(features, rois, prob, 2, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sg_roi_align(features, rois, prob, 2, 0.25)
    assert cast.dtype == dtype
    assert torch.equal(cast, plain)


def test_wrong_shapes_given_to_the_op_itself_raise() -> None:
    features, rois = feature_levels()[0], ROIS
    for args in ((features[0], rois, None), (features, rois[:, :4], None), (features, rois, maps()[:1])):
        with pytest.raises(RuntimeError):
            OPS.sg_roi_align(*args, *ONE)


class Both(nn.Module):
    """A user of both modules, with everything that the network's heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MultiScaleSgRoIAlign((2, 3), (0.5, 0.25), canonical_scale=12, canonical_level=1)
        self.pool_one = SgRoIAlign((2, 3), 0.5)

    def forward(self, fine: Tensor, coarse: Tensor, rois: Tensor, prob: Tensor) -> Tensor:
        return self.pool([fine, coarse], rois, prob) + self.pool_one(fine, rois)


def more_rois() -> tuple[Tensor, ...]:
    """Another count of RoIs and other sizes than `Both` was captured with."""
    return torch.randn(2, 3, 12, 10), torch.randn(2, 3, 6, 5), torch.cat([ROIS, ROIS[:3]]), torch.rand(7, 3, 4)


def test_export_with_dynamic_shapes() -> None:
    model = Both()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model,
        (*feature_levels(), ROIS, maps()),
        dynamic_shapes=({2: auto, 3: auto}, {2: auto, 3: auto}, {0: auto}, {0: auto}),
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "dsg.multiscale_sg_roi_align.default" in targets
    assert "dsg.sg_roi_align.default" in targets
    args = more_rois()
    assert torch.equal(program.module()(*args), model(*args))


@pytest.fixture
def torchscript_without_its_farewell() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.*deprecated")
        yield


@pytest.mark.usefixtures("torchscript_without_its_farewell")
def test_trace_with_dynamic_shapes() -> None:
    model = Both()
    traced = torch.jit.trace(model, (*feature_levels(), ROIS, maps()))
    args = more_rois()
    assert torch.equal(traced(*args), model(*args))


def test_compile_whole_graph_forward_and_backward() -> None:
    model = Both()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for args in ((*feature_levels(), ROIS, maps()), more_rois()):
        results = []
        for function in (compiled, model):
            fine, coarse, rois, prob = (tensor.clone() for tensor in args)
            inputs = [tensor.requires_grad_() for tensor in (fine, coarse, prob)]
            output = function(fine, coarse, rois, prob)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right)


def test_fake_tensors_are_checked() -> None:
    features = torch.empty(2, 3, 8, 6, device="meta")
    rois = torch.empty(4, 5, device="meta")
    output = OPS.sg_roi_align(features, rois, None, *ONE)
    assert (output.shape, output.device.type) == ((4, 3, 2, 3), "meta")
    with pytest.raises(RuntimeError, match="2 maps for 4 rois"):
        OPS.sg_roi_align(features, rois, torch.empty(2, 3, 3, device="meta"), *ONE)
