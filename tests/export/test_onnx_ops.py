"""The ops in ONNX: their bodies in standard operators, and the native kernels, against the ops of torch."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dsg.export.onnx_bodies import add_bodies
from dsg.export.onnx_ops import DEFORMABLE_OPSET, OPSET, opset_of, translations
from dsg.export.op_library import OP_LIBRARY
from dsg.ops import MultiScaleSgRoIAlign, SgRoIAlign

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
WAYS = ["body", pytest.param("kernel", marks=pytest.mark.skipif(not OP_LIBRARY.is_file(), reason="not built"))]


class Pyramid(torch.nn.Module):
    """The multi-scale op with tensors as arguments, as an exporter wants them."""

    def __init__(self, op: MultiScaleSgRoIAlign) -> None:
        super().__init__()
        self.op = op

    def forward(self, rois, prob, *levels):
        return self.op(list(levels), rois, prob)


class One(torch.nn.Module):
    def __init__(self, op: SgRoIAlign) -> None:
        super().__init__()
        self.op = op

    def forward(self, rois, prob, features):
        return self.op(features, rois, prob)


def to_onnx(module: torch.nn.Module, arguments: tuple, path: Path) -> Path:
    """The module as an ONNX file with bodies; the number of RoIs is free."""
    count = torch.export.Dim("count")
    dynamic = [None if tensor is None else {0: count} if tensor.dim() in (2, 3) else {} for tensor in arguments]
    if isinstance(module, Pyramid):
        dynamic = [*dynamic[:2], tuple(dynamic[2:])]
    names = ["rois", *(["prob"] if arguments[1] is not None else [])]
    names += [f"level_{number}" for number in range(len(arguments) - 2)]
    program = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=tuple(dynamic),
        input_names=names,
        custom_translation_table=translations(),
        verbose=False,
    )
    model = program.model_proto
    add_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def run(path: Path, way: str, arguments: tuple) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if way == "kernel":
        options.register_custom_ops_library(str(OP_LIBRARY))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = [tensor.numpy() for tensor in arguments if tensor is not None]
    names = [one.name for one in session.get_inputs()]
    return session.run(None, dict(zip(names, given, strict=True)))[0]


def some_rois(count: int, images: int, seed: int) -> torch.Tensor:
    """Boxes of all sizes, some outside the picture of 128 x 160, some of no size, some that are none."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 150 - 20
    sides = torch.rand(count, 2, generator=generator) ** 3 * 400
    index = torch.randint(images, (count, 1), generator=generator).float()
    rois = torch.cat([index, corner, corner + sides], dim=1)
    rois[0, 3:] = rois[0, 1:3]
    rois[1, 2] = torch.nan
    rois[2, 4] = torch.inf
    rois[3, 0], rois[4, 0], rois[5, 0] = -1, images, 0.5
    return rois


def levels(count: int, dtype: torch.dtype, channels: int = 5) -> list[torch.Tensor]:
    return [torch.randn(2, channels, 32 >> level, 40 >> level).to(dtype) for level in range(count)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own parts
        yield


CASES = [
    # side, map's side, sampling, aligned, dtype
    (7, 28, 2, True, torch.float32),
    (14, None, 2, True, torch.float32),
    (7, 14, 3, False, torch.float32),
    ((3, 5), 13, 1, True, torch.float32),
    (7, None, 0, False, torch.float32),
    (7, 28, 2, True, torch.float16),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("side", "map_side", "sampling", "aligned", "dtype"), CASES)
def test_pyramid(side, map_side, sampling, aligned, dtype, way, tmp_path) -> None:
    module = Pyramid(MultiScaleSgRoIAlign(side, SCALES, sampling, aligned))

    def arguments(count: int, seed: int) -> tuple:
        prob = None if map_side is None else torch.rand(count, map_side, map_side).to(dtype)
        return (some_rois(count, 2, seed), prob, *levels(4, dtype))

    path = to_onnx(module, arguments(9, 0), tmp_path / "op.onnx")
    given = arguments(40, 1)
    wanted = module(*given).float().numpy()
    found = run(path, way, given)
    assert found.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 if dtype == torch.float16 else 2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guided", [True, False])
def test_one_level(guided, way, tmp_path) -> None:
    module = One(SgRoIAlign(7, 1 / 4))
    example = (some_rois(9, 2, 0), torch.rand(9, 28, 28) if guided else None, *levels(1, torch.float32))
    path = to_onnx(module, example, tmp_path / "op.onnx")
    assert [(node.domain, node.op_type) for node in onnx.load(path).graph.node if node.domain] == [
        ("dsg", "SgRoIAlign")
    ]
    given = (some_rois(30, 2, 1), torch.rand(30, 28, 28) if guided else None, *levels(1, torch.float32))
    np.testing.assert_allclose(run(path, way, given), module(*given).numpy(), rtol=0, atol=2e-5)


def test_adaptive_sampling_with_a_map_is_refused(tmp_path) -> None:
    example = (some_rois(9, 2, 0), torch.rand(9, 28, 28), *levels(1, torch.float32))
    with pytest.raises(ValueError, match=r"adaptive sampling \(sampling_ratio <= 0\) has no ONNX body"):
        to_onnx(One(SgRoIAlign(7, 1 / 4, sampling_ratio=0)), example, tmp_path / "op.onnx")


class Nms(torch.nn.Module):
    def forward(self, boxes, scores, groups, valid):
        from dsg.ops import batched_nms

        return batched_nms(boxes, scores, groups, valid, 0.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_nms_of_a_batch_of_another_size(batch, way, tmp_path) -> None:
    def arguments(images: int, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(images, 300, 2, generator=generator) * 600
        boxes = torch.cat([corner, corner + 20 + 150 * torch.rand(images, 300, 2, generator=generator)], dim=2)
        groups = torch.randint(80, (images, 300), generator=generator) * torch.randint(
            2, (images, 1), generator=generator
        )
        valid = torch.rand(images, 300, generator=generator) > 0.1
        return boxes, torch.rand(images, 300, generator=generator), groups, valid

    images = torch.export.Dim("images")
    program = torch.onnx.export(
        Nms(),
        arguments(3, 0),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=tuple({0: images} for _ in range(4)),
        custom_translation_table=translations(),
        verbose=False,
    )
    model = program.model_proto
    add_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    loops = {"Loop", "Scan", "If", "SequenceMap"}
    (body,) = model.functions
    assert not [node.op_type for node in (*model.graph.node, *body.node) if node.op_type in loops]
    options = onnxruntime.SessionOptions()
    if way == "kernel":
        options.register_custom_ops_library(str(OP_LIBRARY))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    for seed, none_valid in itertools.product(range(1, 6), (False, True)):
        given = list(arguments(batch, seed))
        if none_valid:
            given[3] = torch.zeros_like(given[3])
        found = session.run(None, dict(zip(names, (tensor.numpy() for tensor in given), strict=True)))[0]
        assert np.array_equal(found, Nms()(*given).numpy())


class Deformable(torch.nn.Module):
    """A deformable convolution before the op: the two need different versions of ONNX's operators."""

    def __init__(self, modulated: bool) -> None:
        super().__init__()
        self.modulated = modulated
        self.weight = torch.nn.Parameter(torch.randn(6, 2, 3, 3))
        self.op = SgRoIAlign(7, 1 / 4)

    def forward(self, features, offsets, weights, rois):
        from torchvision.ops import deform_conv2d

        mask = weights if self.modulated else None
        convolved = deform_conv2d(features, offsets, self.weight, stride=2, padding=1, mask=mask)
        return self.op(convolved, rois)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolutions(modulated, tmp_path) -> None:
    features, offsets = torch.randn(2, 4, 32, 40), 3 * torch.randn(2, 18, 16, 20)
    given = (features, offsets, torch.rand(2, 9, 16, 20), some_rois(12, 2, 0))
    recorded = torch.export.export(Deformable(modulated), given)
    program = torch.onnx.export(
        recorded, dynamo=True, opset_version=opset_of(recorded), custom_translation_table=translations(), verbose=False
    )
    model = program.model_proto
    add_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == DEFORMABLE_OPSET
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    tensors = {
        name: tensor.numpy() for name, tensor in zip(("features", "offsets", "weights", "rois"), given, strict=True)
    }
    found = session.run(None, {name: tensors[name] for name in names})[0]
    with torch.no_grad():
        wanted = recorded.module()(*given).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
