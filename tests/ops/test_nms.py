"""Greedy suppression: by hand, against torchvision, and each implementation against the other."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from dsg.ops import _reference_nms, batched_nms, kernel_name

THRESHOLD = 0.5


def crowd(seed: int, batch: int, count: int, group_count: int, dtype: torch.dtype = torch.float32):
    """Boxes that overlap a lot, scores with ties, groups, and rows that do not count."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) * 60
    side = torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) * 40 + 1
    scores = torch.randint(0, max(count // 2, 1), (batch, count), generator=generator).to(dtype)
    groups = torch.randint(0, group_count, (batch, count), generator=generator)
    valid = torch.rand(batch, count, generator=generator) > 0.15
    return torch.cat([corner, corner + side], dim=2).to(dtype), scores, groups, valid


def by_torchvision(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Group by group, image by image."""
    keep = torch.zeros_like(valid)
    for image in range(len(boxes)):
        for group in groups[image].unique():
            rows = (valid[image] & (groups[image] == group)).nonzero().squeeze(1)
            # ties: torchvision's own order of equal scores is not stable, so it is given ranks
            rank = -scores[image, rows].argsort(descending=True, stable=True).argsort().to(boxes.dtype)
            keep[image, rows[torchvision_nms(boxes[image, rows], rank, threshold)]] = True
    return keep


def test_by_hand() -> None:
    # IoU of the first two 2/3, of the second and third 1/3; the fourth is the first again, in another group
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 2, 10, 12], [0, 7, 10, 17], [0, 0, 10, 10], [0, 0, 10, 10]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.95]])
    groups = torch.tensor([[0, 0, 0, 1, 0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert batched_nms(boxes, scores, groups, valid, 0.5).tolist() == [[True, False, True, True, False]]
    assert batched_nms(boxes, scores, groups, valid, 0.7).tolist() == [[True, True, True, True, False]]


def test_what_is_removed_removes_nothing() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]]])  # neighbours overlap, ends do not
    keep = batched_nms(boxes, torch.tensor([[3.0, 2, 1]]), torch.zeros(1, 3).long(), torch.ones(1, 3).bool(), 0.4)
    assert keep.tolist() == [[True, False, True]]


def test_an_overlap_equal_to_the_threshold_stays_and_empty_boxes_touch_nothing() -> None:
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 2], [1, 1, 1, 1], [1, 1, 1, 1]]])
    keep = batched_nms(boxes, torch.tensor([[4.0, 3, 2, 1]]), torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), 0.5)
    assert keep.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "count", "groups"), [(3, 200, 1), (2, 333, 4), (1, 64, 70), (4, 1, 1), (2, 65, 2)])
def test_equal_to_torchvision(batch: int, count: int, groups: int, dtype: torch.dtype) -> None:
    given_ = crowd(count, batch, count, groups, dtype)
    keep = batched_nms(*given_, THRESHOLD)
    assert torch.equal(keep, by_torchvision(*given_, THRESHOLD))
    assert keep.any() and (count == 1 or not keep.all())


@given(st.integers(0, 10_000), st.integers(0, 90), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
@settings(max_examples=40, deadline=None)
def test_kernel_and_plain_pytorch_agree(seed: int, count: int, groups: int, threshold: float) -> None:
    boxes, _, group, valid = crowd(seed, 2, count, groups, torch.float64)
    found = torch.ops.dsg.batched_nms(boxes, group, valid, threshold)
    assert torch.equal(found, _reference_nms.batched_nms(boxes, group, valid, threshold))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    keep = batched_nms(
        torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape).long(), torch.ones(shape) > 0, 0.5
    )
    assert keep.shape == shape


def test_rows_that_are_not_valid_may_hold_anything() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [torch.nan] * 4, [-torch.inf, 0, torch.inf, 10]]])
    keep = batched_nms(
        boxes,
        torch.tensor([[0.5, torch.nan, 0.9]]),
        torch.zeros(1, 3).long(),
        torch.tensor([[True, False, False]]),
        0.1,
    )
    assert keep.tolist() == [[True, False, False]]


def test_opcheck() -> None:
    boxes, _, groups, valid = crowd(0, 2, 30, 3)
    torch.library.opcheck(torch.ops.dsg.batched_nms.default, (boxes, groups, valid, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, s, g, v: (b[0], s, g, v), r"boxes must be \[B, N, 4\], got \[30, 4\]"),
        (lambda b, s, g, v: (b, s[:, :5], g, v), r"scores must be \[B, N\] = \[2, 30\], got \[2, 5\]"),
        (lambda b, s, g, v: (b, s, g[:1], v), r"groups must be"),
        (lambda b, s, g, v: (b, s, g, v.flatten()), r"valid must be"),
    ],
)
def test_wrong_shapes_are_named(change: Callable[..., tuple], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batched_nms(*change(*crowd(0, 2, 30, 3)), 0.5)


@pytest.mark.skipif(kernel_name() == "plain PyTorch", reason="no kernel is built")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 30, 4, dtype=torch.float16), "float32 or float64"),
        (1, torch.zeros(2, 30, dtype=torch.int32), "groups must be int64"),
        (2, torch.zeros(2, 30), "valid must be bool"),
        (1, torch.zeros(2, 31, dtype=torch.int64), "as the boxes are"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_read(place: int, value: Tensor, message: str) -> None:
    boxes, _, groups, valid = crowd(0, 2, 30, 3)
    arguments = [boxes, groups, valid]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dsg.batched_nms(*arguments, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "count", "groups"), [(16, 3000, 5), (2, 4096, 80), (3, 64, 1), (1, 1, 1), (2, 700, 1)]
)
def test_cuda_equals_cpu(batch: int, count: int, groups: int, dtype: torch.dtype) -> None:
    given_ = crowd(batch + count, batch, count, groups, dtype)
    wanted = batched_nms(*given_, 0.5)
    for _ in range(3):
        found = batched_nms(*(tensor.cuda() for tensor in given_), 0.5).cpu()
        # float32 on the two may round the overlap of a pair at the threshold to either side
        assert (found != wanted).float().mean() <= (0 if dtype == torch.float64 else 1e-3)
