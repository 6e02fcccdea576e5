"""Copy-paste, against a slow loop over pixels and by hand."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsg.model.data.copy_paste import copy_paste

# Slow machines are no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sample(size, boxes, has_mask, seed=0, image_id=1):
    """Rectangles as masks: what is pasted where can be told from whole pixels."""
    rng = np.random.default_rng(seed)
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, box, drawn in zip(masks, boxes, has_mask, strict=True):
        if drawn:
            x1, y1, x2, y2 = box
            mask[y1:y2, x1:x2] = 1
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(1, len(boxes) + 1) + 10 * seed,
        "masks": masks,
        "has_mask": torch.tensor(has_mask, dtype=torch.bool),
        "ignore_boxes": torch.tensor([[0.0, 0, seed + 1, 1]]),
        "image_id": image_id,
    }
    return image, target


def rng(seed=0):
    return np.random.default_rng(seed)


def test_pasted_object_covers_what_is_below():
    below = sample((10, 10), [(1, 1, 5, 5), (7, 7, 9, 9)], [True, True])
    above = sample((10, 10), [(3, 0, 8, 6)], [True], seed=1, image_id=2)
    image, target = copy_paste(below, above, rng())
    assert torch.equal(image[:, 0:6, 3:8], above[0][:, 0:6, 3:8])
    outside = torch.ones(10, 10, dtype=torch.bool)
    outside[0:6, 3:8] = False
    assert torch.equal(image[:, outside], below[0][:, outside])
    # The first loses its right half, the second nothing, the pasted one comes last.
    assert target["boxes"].tolist() == [[1, 1, 3, 5], [7, 7, 9, 9], [3, 0, 8, 6]]
    assert target["labels"].tolist() == [1, 2, 11]
    assert target["masks"].flatten(1).sum(1).tolist() == [8, 4, 30]
    assert target["has_mask"].tolist() == [True] * 3
    assert target["ignore_boxes"].tolist() == below[1]["ignore_boxes"].tolist()
    assert target["image_id"] == 1


def test_inputs_are_left_alone():
    below = sample((10, 10), [(1, 1, 5, 5)], [True])
    above = sample((10, 10), [(3, 0, 8, 6)], [True], seed=1)
    before = [below[0].clone(), below[1]["masks"].clone(), below[1]["boxes"].clone()]
    copy_paste(below, above, rng())
    for tensor, old in zip((below[0], below[1]["masks"], below[1]["boxes"]), before, strict=True):
        assert torch.equal(tensor, old)


def test_hidden_objects_are_dropped():
    # 100 pixels each: 91 covered, 90 covered (just kept), 100 covered.
    below = sample((40, 40), [(0, 0, 10, 10), (10, 0, 20, 10), (20, 0, 30, 10)], [True] * 3)
    above = sample((40, 40), [(0, 0, 30, 10)], [True], seed=1)
    above[1]["masks"][0, 0, 0:9] = 0
    above[1]["masks"][0, 0, 10:20] = 0
    _, target = copy_paste(below, above, rng())
    assert target["labels"].tolist() == [2, 11]
    assert target["boxes"][0].tolist() == [10, 0, 20, 1]


def test_box_only_objects_stay_unless_mostly_covered_and_are_never_pasted():
    below = sample((20, 20), [(0, 0, 10, 10), (10, 0, 20, 10)], [False, False])
    above = sample((20, 20), [(5, 0, 16, 10), (0, 0, 20, 20)], [True, False], seed=1)
    image, target = copy_paste(below, above, rng())
    # Half of the first is covered, 6 tenths of the second.
    assert target["labels"].tolist() == [1, 11]
    assert target["boxes"].tolist() == [[0, 0, 10, 10], [5, 0, 16, 10]]
    assert target["has_mask"].tolist() == [False, True]
    assert not target["masks"][0].any()
    assert torch.equal(image[:, 10:], below[0][:, 10:])


def test_nothing_to_paste_gives_the_sample_itself():
    below = sample((10, 10), [(1, 1, 5, 5)], [True])
    for above in (sample((10, 10), [], []), sample((10, 10), [(1, 1, 3, 3)], [False])):
        assert copy_paste(below, above, rng()) is below
    # All of it lies outside of the smaller picture.
    assert copy_paste(below, sample((30, 30), [(12, 2, 20, 20)], [True]), rng()) is below


def test_pictures_of_other_sizes_are_cut_and_padded():
    below = sample((10, 12), [], [])
    image, target = copy_paste(below, sample((30, 8), [(2, 4, 6, 20)], [True], seed=1), rng())
    assert image.shape == (3, 10, 12) and target["masks"].shape == (1, 10, 12)
    assert target["boxes"].tolist() == [[2, 4, 6, 10]]
    assert target["masks"].sum() == 4 * 6


def test_an_empty_picture_below():
    _, target = copy_paste(sample((10, 10), [], []), sample((10, 10), [(1, 1, 3, 4)], [True], seed=1), rng())
    assert target["boxes"].tolist() == [[1, 1, 3, 4]]


def test_any_number_of_objects_may_be_chosen():
    below = sample((10, 10), [], [])
    above = sample((10, 10), [(i, 0, i + 1, 5) for i in range(5)], [True] * 5, seed=1)
    counts = {len(copy_paste(below, above, rng(seed))[1]["labels"]) for seed in range(60)}
    assert counts == {1, 2, 3, 4, 5}
    chosen = {tuple(copy_paste(below, above, rng(seed))[1]["labels"].tolist()) for seed in range(60)}
    assert len(chosen) > 15


boxes = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 13), st.integers(1, 8), st.integers(1, 8)).map(
        lambda b: (b[0], b[1], min(b[0] + b[2], 12), min(b[1] + b[3], 14))
    ),
    max_size=5,
)


@unhurried
@given(boxes, boxes, st.integers(0, 1000), st.data())
def test_equals_a_loop_over_objects(first, second, seed, data):
    below = sample((14, 12), first, [data.draw(st.booleans()) for _ in first])
    above = sample((14, 12), second, [data.draw(st.booleans()) for _ in second], seed=1)
    image, target = copy_paste(below, above, rng(seed))
    pasted = [label - 11 for label in target["labels"].tolist() if label > 10]
    assert all(above[1]["has_mask"][index] for index in pasted)
    assert bool(pasted) == bool(above[1]["has_mask"].any())
    cover = np.zeros((14, 12), bool)
    for index in pasted:
        cover |= above[1]["masks"][index].numpy() == 1
    np.testing.assert_array_equal(image.numpy(), np.where(cover, above[0].numpy(), below[0].numpy()))
    labels, rows = [], []
    for index, (x1, y1, x2, y2) in enumerate(first):
        if below[1]["has_mask"][index]:
            mask = (below[1]["masks"][index].numpy() == 1) & ~cover
            if mask.sum() * 10 < (x2 - x1) * (y2 - y1) or not mask.any():
                continue
            ys, xs = np.nonzero(mask)
            rows.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        else:
            if cover[y1:y2, x1:x2].mean() > 0.5:
                continue
            rows.append([x1, y1, x2, y2])
        labels.append(index + 1)
    assert target["labels"].tolist() == labels + [index + 11 for index in pasted]
    assert target["boxes"][: len(rows)].tolist() == rows
