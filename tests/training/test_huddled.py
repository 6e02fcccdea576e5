"""Subsets of huddled objects, and AP over all objects, against overlaps by hand and a slow loop."""

import numpy as np
import pytest

from dsg.model.training.evaluation import evaluate_results
from dsg.model.training.huddled import THRESHOLDS, evaluate_huddled, format_huddled, huddled_subsets


def document(boxes_by_image, categories=(1, 2, 3)):
    """Annotations of (category id, box) for each image, masks filling the boxes."""
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": polygon(box),
        }
        for number, (image_id, category_id, box) in enumerate(
            ((image_id, *entry) for image_id, entries in boxes_by_image.items() for entry in entries), start=1
        )
    ]
    return {
        "images": [{"id": image_id, "height": 200, "width": 300} for image_id in boxes_by_image],
        "categories": [{"id": number, "name": f"class {number}"} for number in categories],
        "annotations": annotations,
    }


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def result(image_id, category_id, box, score, masks=True):
    entry = {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}
    return {**entry, "segmentation": polygon(box)} if masks else entry


def random_set(seed):
    rng = np.random.default_rng(seed)
    boxes, results = {}, []
    for image_id in range(1, 13):
        sides = rng.integers(20, 90, (rng.integers(0, 7), 2))
        corners = rng.integers(0, 110, sides.shape)
        boxes[image_id] = [
            (int(rng.integers(1, 4)), tuple(map(float, (*corner, *side))))
            for corner, side in zip(corners, sides, strict=True)
        ]
        for category_id, box in boxes[image_id] * 2:
            near = tuple(float(v) for v in np.maximum(np.array(box) + rng.integers(-6, 7, 4), 1))
            wrong = rng.random() < 0.2
            results.append(result(image_id, 1 + category_id % 3 if wrong else category_id, near, float(rng.random())))
    return document(boxes), results


def box_iou(one, other):
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    return common / (one[2] * one[3] + other[2] * other[3] - common)


def slow_average_precision(annotations, results, image_ids):
    """Match greedily within image and class, then rank all detections on one curve."""
    objects = [one for one in annotations["annotations"] if one["image_id"] in image_ids]
    ranked = sorted((one for one in results if one["image_id"] in image_ids), key=lambda one: -one["score"])
    averages = []
    for threshold in np.linspace(0.5, 0.95, 10):
        taken, hits = set(), []
        for found in ranked:
            candidates = [
                (box_iou(found["bbox"], one["bbox"]), one["id"])
                for one in objects
                if (one["image_id"], one["category_id"]) == (found["image_id"], found["category_id"])
                and one["id"] not in taken
            ]
            overlap, best = max(candidates, default=(0.0, None))
            hits.append(overlap >= threshold)
            if hits[-1]:
                taken.add(best)
        right = np.cumsum(hits)
        precision, recall = right / np.arange(1, len(hits) + 1), right / len(objects)
        points = [precision[recall >= level].max(initial=0.0) for level in np.linspace(0, 1, 101)]
        averages.append(np.mean(points))
    return np.mean(averages)


def test_subsets_by_hand():
    annotations = document(
        {
            "apart": [(1, (0, 0, 10, 10)), (1, (50, 0, 10, 10))],
            "touching": [(1, (0, 0, 10, 10)), (2, (10, 0, 10, 10))],  # an edge in common, nothing else
            "third": [
                (1, (0, 0, 10, 10)),
                (2, (5, 0, 10, 10)),
                (1, (100, 0, 10, 10)),
            ],  # IoU 50 / 150, of two in three
            "alone": [(1, (0, 0, 10, 10))],
            "empty": [],
        }
    )
    assert huddled_subsets(annotations, -1.0, 0.0) == ["apart", "touching", "third", "alone"]
    assert huddled_subsets(annotations, 0.0, 0.0) == ["third"]
    assert huddled_subsets(annotations, 0.3, 0.6) == ["third"]
    assert huddled_subsets(annotations, 0.3, 0.7) == []
    assert huddled_subsets(annotations, 0.34, 0.0) == []
    # A crowd region huddles nothing, and is none of the objects that are counted.
    annotations["annotations"][5]["iscrowd"] = 1
    assert huddled_subsets(annotations, 0.0, 0.0) == []


def test_overlap_counts_whatever_the_class():
    same = document({1: [(1, (0, 0, 10, 10)), (1, (2, 0, 10, 10))]})
    other = document({1: [(1, (0, 0, 10, 10)), (2, (2, 0, 10, 10))]})
    assert huddled_subsets(same, 0.5, 0.5) == huddled_subsets(other, 0.5, 0.5) == [1]


@pytest.mark.parametrize("seed", range(3))
def test_rows_equal_a_slow_loop(seed):
    annotations, results = random_set(seed)
    rows = evaluate_huddled(annotations, results)
    assert len(rows) == 1 + len(THRESHOLDS) ** 2
    assert (rows[0].overlap_threshold, rows[0].proportion_threshold) == (None, None)
    assert rows[0].images == 12 and rows[0].objects == len(annotations["annotations"])
    for row in rows:
        image_ids = set(range(1, 13))
        if row.overlap_threshold is not None:
            image_ids = set(huddled_subsets(annotations, row.overlap_threshold, row.proportion_threshold))
        assert row.images == len(image_ids)
        if row.objects:
            # Boxes and masks are the same whole pixels here.
            assert row.bbox == pytest.approx(slow_average_precision(annotations, results, image_ids), abs=1e-9)
            assert row.segm == pytest.approx(row.bbox, abs=1e-9)
        else:
            assert row.bbox is None and row.segm is None
    assert 0.05 < rows[0].bbox < 0.95 and any(row.objects for row in rows[7:])


def test_the_mean_is_over_objects_not_classes():
    # Nine objects of class 1 found, one of class 2 missed: .5 over classes, 91 of 101 recalls over objects.
    annotations = document({1: [(1, (30 * i, 0, 20, 20)) for i in range(9)] + [(2, (0, 100, 20, 20))]}, (1, 2))
    results = [result(1, 1, (30 * i, 0, 20, 20), 0.9, masks=False) for i in range(9)]
    rows = evaluate_huddled(annotations, results)
    assert rows[0].bbox == pytest.approx(91 / 101) and rows[0].segm is None
    assert evaluate_results(annotations, results).bbox["AP"] == pytest.approx(0.5)
    # Of another class, a detection is wrong and the object is still to be found.
    results.append(result(1, 1, (0, 100, 20, 20), 0.95, masks=False))
    assert evaluate_huddled(annotations, results)[0].bbox == pytest.approx(0.9 * 91 / 101)


def test_the_limit_of_detections():
    annotations = document({1: [(1, (i % 20 * 12, i // 20 * 12, 8, 8)) for i in range(150)]})
    results = [result(1, 1, one["bbox"], 0.9, masks=False) for one in annotations["annotations"]]
    assert evaluate_huddled(annotations, results)[0].bbox == pytest.approx(1.0)
    assert evaluate_huddled(annotations, results, max_detections=75)[0].bbox == pytest.approx(51 / 101)


def test_no_results():
    rows = evaluate_huddled(document({1: [(1, (0, 0, 20, 20)), (1, (2, 0, 20, 20))]}), [])
    assert {row.bbox for row in rows} == {0.0} and {row.segm for row in rows} == {0.0}


def test_the_table():
    annotations, results = random_set(0)
    rows = evaluate_huddled(annotations, results)
    lines = format_huddled(rows).splitlines()
    assert lines[0] == f"all images: {100 * rows[0].bbox:.1f} / {100 * rows[0].segm:.1f}"
    assert lines[1].split()[-6:] == [f"{value:.1f}" for value in THRESHOLDS]
    assert len(lines) == 2 + len(THRESHOLDS) and lines[2].split()[0] == "0.0"
    assert f"{100 * rows[1].bbox:.1f} / {100 * rows[1].segm:.1f}" in lines[2]
