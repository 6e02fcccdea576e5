import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from dsg.model.network.boxes import (
    clip_boxes,
    decode_deltas,
    encode_deltas,
    has_sides,
    intersection,
    iou,
    non_maximum_suppression,
)


def random_boxes(count: int, seed: int, extent: float = 100.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * extent
    return torch.cat(
        [corner, corner + torch.rand(count, 2, generator=generator, dtype=torch.float64) * extent / 2 + 2],
        1,
    )


def test_iou_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    others = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [5, 5, 5, 5]])
    assert torch.allclose(iou(boxes, others)[0], torch.tensor([1.0, 50 / 150, 0.0, 0.0]))
    assert iou(boxes, others)[1].tolist() == [0, 0, 0, 0]
    assert intersection(boxes, others)[0].tolist() == [100, 50, 0, 0]


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_iou_is_torchvisions(seed):
    boxes, others = random_boxes(7, seed), random_boxes(5, seed + 1)
    assert torch.allclose(iou(boxes, others), torchvision.ops.box_iou(boxes, others), atol=1e-12)


def test_deltas_by_hand():
    reference = torch.tensor([[10.0, 20, 30, 60]])  # 20 wide, 40 high, centre (20, 40)
    moved = torch.tensor([[15.0, 0, 55, 40]])  # 40 wide, 40 high, centre (35, 20)
    expected = [10 * 15 / 20, 10 * -20 / 40, 5 * math.log(2), 0.0]
    assert torch.allclose(encode_deltas(moved, reference, (10, 10, 5, 5))[0], torch.tensor(expected))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_decode_inverts_encode(seed):
    boxes, references = random_boxes(9, seed), random_boxes(9, seed + 1)
    deltas = encode_deltas(boxes, references, (10, 10, 5, 5))
    assert torch.allclose(decode_deltas(deltas, references, (10, 10, 5, 5)), boxes, atol=1e-9)


def test_growth_is_bounded():
    reference = torch.tensor([[0.0, 0, 16, 16]])
    decoded = decode_deltas(torch.tensor([[0.0, 0, 1e9, 0]]), reference, (1, 1, 1, 1))
    assert decoded[0, 2] - decoded[0, 0] == pytest.approx(1000, rel=1e-5)


def test_clip_uses_each_pictures_own_size():
    boxes = torch.tensor([[[-5.0, -5, 50, 50]], [[-5.0, 10, 50, 50]]])
    clipped = clip_boxes(boxes, torch.tensor([[20, 30], [40, 10]]))
    assert clipped.tolist() == [[[0, 0, 30, 20]], [[0, 10, 10, 40]]]


def test_nan_has_no_sides():
    assert has_sides(torch.tensor([[0.0, 0, math.nan, 5], [0, 0, 5, 5], [0, 0, 0.5, 5]]), 1.0).tolist() == [
        False,
        True,
        False,
    ]


def loop_nms(boxes, scores, groups, valid, threshold):
    """Greedy suppression, one pair at a time."""
    alive = [i for i in scores.argsort(descending=True).tolist() if valid[i]]
    kept = []
    for i in alive:
        overlaps = [
            float(torchvision.ops.box_iou(boxes[i : i + 1], boxes[j : j + 1])) for j in kept if groups[j] == groups[i]
        ]
        if all(overlap <= threshold for overlap in overlaps):
            kept.append(i)
    return kept


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 0.7]))
@settings(max_examples=25, deadline=None)
def test_suppression_is_greedy_within_groups(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack([random_boxes(14, seed), random_boxes(14, seed + 1, extent=3000.0)]).float()
    scores = torch.rand(2, 14, generator=generator)
    groups = torch.randint(0, 3, (2, 14), generator=generator)
    valid = torch.rand(2, 14, generator=generator) > 0.2
    index, kept = non_maximum_suppression(boxes, scores, groups, valid, threshold, keep=20)
    for image in range(2):
        expected = loop_nms(boxes[image].double(), scores[image], groups[image], valid[image], threshold)
        assert index[image][kept[image]].tolist() == expected
        assert not kept[image][len(expected) :].any()


def test_suppression_does_not_depend_on_the_number_of_groups():
    """In float32 the offset of a far group would eat the fraction of a coordinate, and with it the overlap."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 10, 19.999]]])  # IoU just above one half
    for group in (0, 100_000):
        groups = torch.full((1, 2), group)
        _, kept = non_maximum_suppression(
            boxes, torch.tensor([[0.9, 0.8]]), groups, torch.ones(1, 2, dtype=torch.bool), 0.5, 2
        )
        assert kept.tolist() == [[True, False]]


def test_nothing_valid_gives_nothing():
    boxes = torch.full((1, 3, 4), math.nan)
    index, kept = non_maximum_suppression(
        boxes,
        torch.ones(1, 3),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.bool),
        0.5,
        2,
    )
    assert not kept.any() and index.tolist() == [[0, 0]]
