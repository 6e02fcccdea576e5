"""Small batches as CUDA graphs: the same detections, and graphs of nothing that has changed."""

import numpy as np
import pytest
import torch

from dsg.model.network.batch import stack_images
from dsg.model.network.build import build
from dsg.model.network.checkpoint import Category, CheckpointInfo
from dsg.model.network.detector import without_padding
from dsg.model.network.info import Resize
from dsg.model.network.predictor import Predictor
from dsg.model.network.replay import Replay

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
INFO = CheckpointInfo(
    name="test",
    preset="dsg_lite0_fpn",
    overrides={},
    categories=tuple(Category(number, f"class {number}") for number in range(1, 5)),
    resize=Resize(96, 128),
    score_threshold=0.05,
)
FIELDS = ("boxes", "scores", "labels", "mask_probs")


def network(preset: str, **overrides):
    """Random weights whose scores lie apart, so that detections come in one order."""
    torch.manual_seed(0)
    model = build(preset, num_classes=4, max_detections=20, proposals=60, **overrides).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("classifier.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
        if name == "mask_iou.predictor.bias":
            torch.nn.init.constant_(parameter, 0.5)
    return model


def assert_same(found, wanted, **tolerance):
    assert [one.image_size for one in found] == [one.image_size for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == len(other)
        for name in FIELDS:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("dsg_lite0_fpn", {}), ("dsg_lite0_fpn", {"mask_iou": True}), ("cascade_dsg_lite0_fpn", {})],
)
def test_padded_detections_without_their_padding_are_the_detections(preset, overrides):
    model = network(preset, **overrides)
    batch, sizes = stack_images([torch.rand(3, 64, 96), torch.rand(3, 60, 70)])
    padded = model.infer(batch, sizes)
    middle = float(padded.scores[padded.valid].median())
    numbers = []
    for threshold in (0.0, middle, 1.0):
        wanted = model.detect(batch, sizes, threshold)
        numbers.append(sum(len(one) for one in wanted))
        assert_same(without_padding(padded, sizes, threshold), wanted, rtol=1e-5, atol=1e-5)
    assert numbers[0] > numbers[1] > numbers[2] == 0


@torch.inference_mode()
def test_a_cpu_has_no_graphs():
    model, replay = network("dsg_lite0_fpn"), Replay()
    batch, sizes = stack_images([torch.rand(3, 64, 96)])
    assert [replay.infer(model, batch, sizes) for _ in range(3)] == [None] * 3


def pictures(count: int, seed: int, size=(96, 128)) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "preset",
    [
        "mask_rcnn_r50_fpn",
        "dsg_r50_fpn",
        "dsg_lite0_fpn",
        "cascade_dsg_lite0_fpn",
        "htc_dsg_lite0_fpn",
        "dsc_lite0_fpn",
    ],
)
def test_replayed_detections_are_those_of_the_network(preset, dtype):
    model = network(preset).cuda().to(dtype).to(memory_format=torch.channels_last)
    predictor = Predictor(model, INFO)
    for count in (1, 3):
        for seed in range(4):  # the first runs as it comes, the second is recorded, the others are replayed
            prepared = [predictor.prepare(picture) for picture in pictures(count, seed)]
            found = predictor.detect(prepared, 0.05)
            wanted = Predictor(model, INFO).detect(prepared, 0.05)  # which has not met the shape before
            assert_same(found, wanted, rtol=0, atol=1e-6)
    assert all(one is not None for one in predictor.runtime._replay._recorded.values())
    assert len(predictor.runtime._replay._recorded) == 2


@pytest.mark.gpu
@GPU
def test_a_batch_begins_before_the_last_one_is_finished():
    predictor = Predictor(network("dsg_lite0_fpn").cuda().half(), INFO)
    batches = [[predictor.prepare(picture) for picture in pictures(2, seed)] for seed in range(6)]
    wanted = [Predictor(predictor.model, INFO).detect(prepared) for prepared in batches]  # each as it comes
    finished, begun = [], []
    for prepared in [*batches, None]:
        if prepared is not None:
            begun.append(predictor.begin(prepared))
        if len(begun) == 2 or prepared is None:
            finished.append(begun.pop(0).finish())
    for found, expected in zip(finished, wanted, strict=True):
        assert_same(found, expected, rtol=0, atol=1e-6)
    (graph,) = predictor.runtime._replay._recorded.values()
    assert graph is not None  # though the second batch began before the first had run


@pytest.mark.gpu
@GPU
def test_a_network_that_changed_is_not_replayed():
    model = network("dsg_lite0_fpn").cuda()
    predictor = Predictor(model, INFO)
    prepared = [predictor.prepare(picture) for picture in pictures(1, 0)]
    for _ in range(3):
        predictor.detect(prepared)
    torch.nn.init.constant_(model.mask_head.predictor.bias, 50.0)  # in place: the graph reads it
    assert float(predictor.detect(prepared)[0].mask_probs.min()) > 0.99
    model.selector.proposals = (60, 1)
    assert len(predictor.detect(prepared)[0]) <= 4
    model.double()
    assert predictor.detect(prepared)[0].boxes.dtype == torch.float64
