"""Detections: checks, selection, and COCO results."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dsg.model.network.detections import Detections, lowest_of, on_cpu, with_counts
from dsg.ops.rle import decode_rle


def detections(number=3, side=14, image_size=(30, 40)):
    generator = torch.Generator().manual_seed(number)
    corners = torch.rand((number, 2), generator=generator) * 20
    return Detections(
        boxes=torch.cat((corners, corners + 1 + torch.rand((number, 2), generator=generator) * 9), dim=1),
        scores=torch.linspace(0.9, 0.1, number),
        labels=torch.arange(number) % 2 + 1,
        mask_probs=torch.rand((number, side, side), generator=generator),
        image_size=image_size,
    )


def test_masks_and_rle_agree():
    found = detections()
    masks = found.masks()
    assert masks.shape == (3, 30, 40) and masks.dtype == torch.bool
    for mask, rle in zip(masks.numpy(), found.rle(), strict=True):
        np.testing.assert_array_equal(decode_rle(rle), mask)


def test_coco_results_hold_plain_numbers_of_full_precision():
    found = detections()
    results = found.to_coco(image_id=17, category_ids=[44, 3])
    assert json.loads(json.dumps(results)) == results
    assert [result["category_id"] for result in results] == [44, 3, 44]
    assert {result["image_id"] for result in results} == {17}
    for result, box, score, rle in zip(results, found.boxes, found.scores, found.rle(), strict=True):
        x, y, w, h = result["bbox"]
        # float64 holds a difference of two float32 of like size exactly.
        assert torch.equal(torch.tensor([x, y, x + w, y + h], dtype=torch.float64).float(), box)
        assert np.float32(result["score"]) == score.item() and type(result["score"]) is float
        assert result["segmentation"] == rle and type(result["category_id"]) is int


def test_category_ids_from_an_array_are_plain_too():
    results = detections().to_coco("a name", np.array([44, 3]))
    assert type(results[0]["category_id"]) is int and results[0]["image_id"] == "a name"


def test_too_few_category_ids():
    with pytest.raises(ValueError, match="detections of image 5: label 2 has no category id, there are 1"):
        detections().to_coco(5, [44])


def test_select_keeps_the_order():
    found = detections(5)  # scores 0.9, 0.7, 0.5, 0.3, 0.1
    assert found.select(0.0, 2).scores.tolist() == found.scores[:2].tolist()
    some = found.select(0.45, 10)
    assert len(some) == 3 and some.image_size == found.image_size
    for name in ("boxes", "scores", "labels", "mask_probs"):
        assert torch.equal(getattr(some, name), getattr(found, name)[:3])
    assert len(found.select(found.scores[2].item(), 10)) == 3  # a score that equals the threshold stays
    assert len(found.select(0.0, 0)) == 0
    with pytest.raises(ValueError, match="max_detections must be at least 0, not -1"):
        found.select(0.0, -1)


def test_select_by_thresholds_of_labels():
    found = detections(5)  # scores 0.9, 0.7, 0.5, 0.3, 0.1 of labels 1, 2, 1, 2, 1
    by_label = found.select((0.4, 0.1), 10)
    assert torch.equal(by_label.scores, found.scores[:4]) and by_label.labels.tolist() == [1, 2, 1, 2]
    assert found.select((0.95, 0.2), 10).labels.tolist() == [2, 2]
    assert torch.equal(found.select([0.95, 0.2], 1).scores, found.scores[1:2])  # counted after the threshold
    exact = found.scores[2].item()
    assert found.select((exact, 2.0), 10).labels.tolist() == [1, 1]  # a score that equals its threshold stays
    assert found.select((float(np.nextafter(np.float32(exact), np.float32(1))), 2.0), 10).labels.tolist() == [1]
    for threshold in (0.0, 0.3, 0.7, 1.0):
        assert torch.equal(found.select((threshold,) * 3, 4).boxes, found.select(threshold, 4).boxes)
    with pytest.raises(ValueError, match="label 2 has no threshold, there are 1"):
        found.select((0.5,), 10)
    assert len(found.select(1.0, 5).select((), 5)) == 0


def test_the_lowest_threshold():
    assert lowest_of(0.25) == 0.25 and lowest_of((0.5, 0.125, 0.75)) == 0.125
    assert lowest_of((1.0 + 2**-23,)) == 1.0  # what `Predictor.detect` takes ends at 1


def test_no_detections():
    none = detections().select(1.0, 100)
    assert len(none) == 0 and none.masks().shape == (0, 30, 40)
    assert none.rle() == [] and none.to_coco(1, [44, 3]) == [] and len(none.select(0.0, 5)) == 0
    assert none.mask_probs.shape == (0, 14, 14)


def test_to_moves_every_tensor():
    moved = detections().to("meta")
    assert {tensor.device.type for tensor in (moved.boxes, moved.scores, moved.labels, moved.mask_probs)} == {"meta"}
    assert moved.image_size == (30, 40)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("scores", torch.ones(3, 1), ValueError, r"scores must be \[3\], not \[3, 1\]"),
        ("scores", torch.tensor(1.0), ValueError, r"scores must be \[1\], not \[\]"),
        ("boxes", torch.ones(3, 5), ValueError, r"boxes must be \[3, 4\], not \[3, 5\]"),
        ("boxes", torch.ones(2, 4), ValueError, r"boxes must be \[3, 4\], not \[2, 4\]"),
        ("labels", torch.ones(2, dtype=torch.int64), ValueError, r"labels must be \[3\], not \[2\]"),
        ("mask_probs", torch.ones(3, 14, 7), ValueError, r"mask_probs must be \[3, 7, 7\], not \[3, 14, 7\]"),
        ("mask_probs", torch.tensor(1.0), ValueError, r"mask_probs must be \[3, 0, 0\], not \[\]"),
        ("image_size", (30, 40, 3), ValueError, r"image_size must be \(height, width\)"),
        ("image_size", (0, 40), ValueError, r"image_size must be \(height, width\)"),
        ("labels", torch.ones(3), TypeError, "labels must be int64, not torch.float32"),
        (
            "mask_probs",
            torch.ones(3, 14, 14, dtype=torch.uint8),
            TypeError,
            "mask_probs must be floating point",
        ),
    ],
)
def test_wrong_fields_are_refused_in_one_line(field, value, error, message):
    with pytest.raises(error, match=message) as caught:
        dataclasses.replace(detections(), **{field: value})
    assert "\n" not in str(caught.value)


def test_fields_cannot_be_set():
    with pytest.raises(dataclasses.FrozenInstanceError):
        detections().scores = torch.ones(3)


def test_arrays_do_what_tensors_do():
    found = detections(6)
    fields = {field: getattr(found, field).numpy() for field in ("boxes", "scores", "labels", "mask_probs")}
    arrays = dataclasses.replace(found, **fields)
    assert arrays.rle() == found.rle() and np.array_equal(arrays.masks(), found.masks().numpy())
    for threshold in (0.3, (0.2, 0.8)):
        one, other = arrays.select(threshold, 3), found.select(threshold, 3)
        assert isinstance(one.boxes, np.ndarray) and np.array_equal(one.boxes, other.boxes.numpy())
        assert one.to_coco(1, [5, 9]) == other.to_coco(1, [5, 9])
    back = arrays.to("cpu")
    assert all(torch.equal(getattr(back, field), getattr(found, field)) for field in fields)
    with pytest.raises(TypeError, match="boxes must be floating point, not int64"):
        dataclasses.replace(arrays, boxes=arrays.boxes.astype(np.int64))


def test_what_is_known_of_masks_goes_with_its_rows():
    (found,) = with_counts([detections(4)])
    assert found.areas == tuple(found.masks().sum(dim=(1, 2)).tolist())
    for rows in ([2, 0], torch.tensor([2, 0]), []):
        some = found.rows(rows)
        assert some.counts == tuple(found.counts[row] for row in rows)
        assert some.areas == tuple(found.areas[row] for row in rows)
    with pytest.raises(ValueError, match="areas must be of 4 masks, not 1"):
        dataclasses.replace(found, areas=(7,))


def test_on_a_cpu_nothing_is_moved():
    found = [detections(3), detections(0)]
    assert [one is other for one, other in zip(on_cpu(found), found, strict=True)] == [True, True]
    assert on_cpu([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_several_pictures_come_from_a_gpu_as_each_alone():
    there = [with_counts([detections(number)])[0].to("cuda") for number in (3, 0, 5)]
    for one, other in zip(there, on_cpu(there), strict=True):
        assert other.boxes.device.type == "cpu" and (other.counts, other.areas) == (one.counts, one.areas)
        for name in ("boxes", "scores", "labels", "mask_probs"):
            assert torch.equal(getattr(one, name).cpu(), getattr(other, name))
