"""COCO evaluation against pycocotools and against averages worked out by hand."""

import contextlib
import copy
import io
import json
import warnings

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dsg.model.training.evaluation import evaluate_results, format_table, max_objects_in_an_image
from dsg.ops.rle import encode_rle, rle_areas, string_to_counts


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def box_mask(box, size):
    """The pixels of a box as compressed RLE."""
    mask = np.zeros(size, dtype=np.bool_)
    x, y, w, h = (round(value) for value in box)
    mask[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
    return encode_rle(mask)


def document(boxes_by_image, size=(200, 300), categories=((1, "cell"),)):
    """One annotation for each (category id, box) of each image."""
    annotations = [
        {
            "id": 0,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": rectangle(*box),
        }
        for image_id, entries in boxes_by_image.items()
        for category_id, box in entries
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {
        "images": [{"id": image_id, "height": size[0], "width": size[1]} for image_id in boxes_by_image],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": annotations,
    }


def results_of(annotations, score=0.9, masks=True):
    """A result for each annotation, exactly on it, scores falling a little."""
    size = annotations["images"][0]["height"], annotations["images"][0]["width"]
    return [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": list(one["bbox"]),
            "score": score - index * 1e-5,
            **({"segmentation": box_mask(one["bbox"], size)} if masks else {}),
        }
        for index, one in enumerate(annotations["annotations"])
    ]


def grid(number, side=8, step=10, columns=28):
    """Boxes that do not touch each other, row by row."""
    return [(1, (step * (i % columns) + 1, step * (i // columns) + 1, side, side)) for i in range(number)]


def random_set(seed, crowded_image=130):
    """Annotations with gaps in ids, crowds, all kinds of segmentation, empty images; results near them."""
    rng = np.random.default_rng(seed)
    size = (240, 320)
    categories = ((7, "cat"), (3, "dog"), (90, "owl"), (12, "never there"))
    boxes = {image_id: [] for image_id in (5, 11, 2, 40, 41, 100)}
    for image_id in (5, 11, 2, 40):
        for _ in range(crowded_image if image_id == 11 else 8):
            w, h = rng.uniform(4, 120, 2)
            x, y = rng.uniform(0, 320 - w), rng.uniform(0, 240 - h)
            category_id = 7 if image_id == 11 else int(rng.choice([7, 3, 90]))
            boxes[image_id].append((category_id, tuple(float(v) for v in np.round((x, y, w, h), 2))))
    annotations = document(boxes, size, categories)
    for index, one in enumerate(annotations["annotations"]):
        if index % 9 == 0:
            one["iscrowd"] = 1
            counts = box_mask(one["bbox"], size)
            one["segmentation"] = counts if index % 2 else plain_rle(counts)
    results = []
    for image_id in (5, 11, 2, 41):  # 40 has objects and no results, 41 results and no objects, 100 neither
        near = [one for one in annotations["annotations"] if one["image_id"] == image_id] * 2
        for one in near + annotations["annotations"][:5]:
            jitter = rng.normal(0, 0.06, 4) * np.repeat([one["bbox"][2:]], 2, axis=0).ravel()
            box = [float(v) for v in np.maximum(np.array(one["bbox"]) + jitter, 0.5)]
            category_id = one["category_id"] if rng.random() < 0.8 else 3
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "score": float(np.round(rng.random(), 1)),  # many equal scores
                    "segmentation": box_mask(box, size),
                }
            )
    return annotations, results


def plain_rle(rle):
    return {"size": rle["size"], "counts": string_to_counts(rle["counts"]).tolist()}


def pycocotools_metrics(annotations, results, kind, max_detections):
    """The nine numbers and AP, AP50 of each class, from pycocotools' arrays."""
    other = "segmentation" if kind == "bbox" else "bbox"
    results = [{key: value for key, value in one.items() if key != other} for one in copy.deepcopy(results)]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = COCO()
        truth.dataset = copy.deepcopy(annotations)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), kind)
        evaluator.params.maxDets = [1, 10, max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else None

    metrics = {
        "AP": mean(precision[..., 0, 2]),
        "AP50": mean(precision[0, ..., 0, 2]),
        "AP75": mean(precision[5, ..., 0, 2]),
        "APs": mean(precision[..., 1, 2]),
        "APm": mean(precision[..., 2, 2]),
        "APl": mean(precision[..., 3, 2]),
        "AR1": mean(recall[..., 0, 0]),
        "AR10": mean(recall[..., 0, 1]),
        "ARmax": mean(recall[..., 0, 2]),
    }
    names = {one["id"]: one["name"] for one in annotations["categories"]}
    per_class = {
        names[category_id]: {"AP": mean(precision[:, :, k, 0, 2]), "AP50": mean(precision[0, :, k, 0, 2])}
        for k, category_id in enumerate(evaluator.params.catIds)
    }
    return metrics, per_class


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_detections", [100, 400])
def test_equal_to_pycocotools(seed, max_detections):
    annotations, results = random_set(seed)
    before = copy.deepcopy((annotations, results))
    evaluation = evaluate_results(annotations, results, max_detections)
    assert (annotations, results) == before
    for kind, found in (("bbox", evaluation.bbox), ("segm", evaluation.segm)):
        expected, per_class = pycocotools_metrics(annotations, results, kind, max_detections)
        assert found == pytest.approx(expected, abs=1e-12)
        for name, values in per_class.items():
            assert evaluation.per_class[name][kind] == pytest.approx(values, abs=1e-12)
    assert evaluation.bbox["AP"] > 0.1 and evaluation.segm["AP"] > 0.1
    assert evaluation.per_class["never there"]["bbox"] == {"AP": None, "AP50": None}


def test_the_document_of_the_command_line():
    annotations, results = random_set(0)
    found = evaluate_results(annotations, results).as_dict()
    assert json.loads(json.dumps(found)) == found
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARmax"]
    assert list(found) == ["max_detections", "bbox", "segm", "per_class"]
    assert list(found["bbox"]) == names == list(found["segm"])
    assert found["max_detections"] == max_objects_in_an_image(annotations) == 115
    assert list(found["per_class"]) == ["cat", "dog", "owl", "never there"]
    assert set(found["per_class"]["cat"]) == {"bbox", "segm"}


def test_a_perfect_detector_needs_enough_detections():
    annotations = document({1: grid(375)})
    results = results_of(annotations)
    assert max_objects_in_an_image(annotations) == 375
    enough = evaluate_results(annotations, results)
    assert enough.max_detections == 375
    assert enough.bbox["AP"] == enough.segm["AP"] == enough.bbox["ARmax"] == pytest.approx(1.0)
    cut = evaluate_results(annotations, results, max_detections=100)
    # 100 of 375 found: precision 1 at the recalls 0.00 to 0.26, which are 27 of 101.
    assert cut.bbox["AP"] == cut.segm["AP"] == pytest.approx(27 / 101)
    assert cut.bbox["ARmax"] == pytest.approx(100 / 375)
    assert evaluate_results(annotations, results, max_detections=5).bbox["AR10"] == pytest.approx(5 / 375)


def test_average_precision_by_hand():
    # Two objects. The best detection overlaps the first by 60 x 100 of 100 x 100: an IoU of 0.6, so it is
    # right at .50, .55 and .60. The next is right everywhere, the last is nowhere near an object.
    annotations = document({1: [(1, (0, 0, 100, 100)), (1, (150, 50, 100, 100))], 2: []})
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 60, 100], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [150, 50, 100, 100], "score": 0.8},
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 50, 50], "score": 0.7},
    ]
    evaluation = evaluate_results(annotations, results)
    # At the low three thresholds both are found first: AP 1. At the other seven the first is wrong: precision
    # 1/2 up to a recall of 1/2 (51 of 101 points), nothing beyond.
    assert evaluation.bbox["AP"] == pytest.approx((3 * 1 + 7 * 0.5 * 51 / 101) / 10)
    assert evaluation.bbox["AP50"] == pytest.approx(1.0)
    assert evaluation.bbox["AP75"] == pytest.approx(0.5 * 51 / 101)
    assert evaluation.bbox["AR1"] == pytest.approx(3 / 10 * 1 / 2)
    assert evaluation.bbox["ARmax"] == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    assert evaluation.bbox["APs"] is None and evaluation.bbox["APm"] is None


def test_boxes_alone_give_no_masks():
    annotations = document({1: grid(3)})
    evaluation = evaluate_results(annotations, results_of(annotations, masks=False))
    assert evaluation.segm is None and "segm" not in evaluation.as_dict()
    assert evaluation.per_class == {"cell": {"bbox": {"AP": pytest.approx(1.0), "AP50": pytest.approx(1.0)}}}


def test_masks_alone_give_boxes_too():
    annotations = document({1: grid(3)})
    results = [{k: v for k, v in one.items() if k != "bbox"} for one in results_of(annotations)]
    evaluation = evaluate_results(annotations, results)
    assert evaluation.bbox["AP"] == evaluation.segm["AP"] == pytest.approx(1.0)


def test_no_results_and_no_objects():
    annotations = document({1: grid(3), 2: []})
    nothing = evaluate_results(annotations, [])
    assert nothing.bbox["AP"] == nothing.segm["AP"] == 0.0 and nothing.bbox["APl"] is None
    annotations["annotations"] = []
    empty = evaluate_results(annotations, [])
    assert empty.bbox["AP"] is None and empty.segm is None and empty.max_detections == 100
    assert max_objects_in_an_image(annotations) == 0
    assert evaluate_results({"images": [], "categories": [], "annotations": []}, []).bbox["AP"] is None


def test_objects_without_masks_are_ignored_by_mask_evaluation():
    annotations = document({1: [(1, (10, 10, 50, 50)), (1, (100, 10, 50, 50)), (1, (200, 10, 50, 50))]})
    results = results_of(annotations)
    annotations["annotations"][0]["segmentation"] = []
    del annotations["annotations"][1]["segmentation"]
    both = evaluate_results(annotations, results)
    assert both.bbox["AP"] == both.segm["AP"] == pytest.approx(1.0)
    # Found or not, they change nothing; a detection beside them is wrong all the same.
    one = evaluate_results(annotations, results[2:])
    assert one.segm["AP"] == pytest.approx(1.0) and one.bbox["AP"] == pytest.approx(34 / 101)
    beside = {**results[0], "segmentation": box_mask((10, 100, 50, 50), (200, 300)), "score": 0.99}
    assert evaluate_results(annotations, [beside, results[2]]).segm["AP"] == pytest.approx(0.5)
    # And where no object has a mask there is nothing to tell.
    annotations["annotations"][2]["segmentation"] = None
    assert evaluate_results(annotations, results).segm["AP"] is None


def test_crowds_are_no_objects_and_hide_what_is_inside():
    annotations = document({1: [(1, (0, 0, 150, 150)), (1, (200, 20, 40, 40))]})
    crowd = annotations["annotations"][0]
    crowd["iscrowd"], crowd["segmentation"] = 1, box_mask(crowd["bbox"], (200, 300))
    inside = [(1, (10 + 30 * i, 10, 20, 20)) for i in range(4)]
    results = results_of(document({1: inside}), score=0.99) + results_of(annotations)[1:]
    evaluation = evaluate_results(annotations, results)
    assert evaluation.bbox["AP"] == evaluation.segm["AP"] == pytest.approx(1.0)
    assert max_objects_in_an_image(annotations) == 1


def test_some_images():
    annotations = document({1: grid(2), 2: grid(4), 3: grid(2)})
    results = [one for one in results_of(annotations) if one["image_id"] != 2]
    assert evaluate_results(annotations, results, image_ids=[1, 3]).bbox["AP"] == pytest.approx(1.0)
    assert evaluate_results(annotations, results, image_ids=[2]).bbox["AP"] == 0.0
    assert evaluate_results(annotations, results, image_ids=[]).bbox["AP"] is None
    with pytest.raises(ValueError, match="image_ids has 9, which the annotations do not have"):
        evaluate_results(annotations, results, image_ids=[1, 9])


def test_ids_that_pycocotools_stumbles_over():
    # It takes an annotation of id 0 for none, and cannot have names for images.
    annotations = document({"a.jpg": grid(1), "b.jpg": grid(1)})
    for number, one in enumerate(annotations["annotations"]):
        one["id"] = number
        del one["area"], one["iscrowd"]
    assert evaluate_results(annotations, results_of(annotations)).bbox["AP"] == pytest.approx(1.0)


def test_classes_of_one_name_stay_apart():
    annotations = document({1: [(1, (0, 0, 9, 9)), (2, (50, 50, 9, 9))]}, categories=((1, "x"), (2, "x"), (3, "y")))
    evaluation = evaluate_results(annotations, results_of(annotations)[:1])
    assert {name: parts["bbox"]["AP"] for name, parts in evaluation.per_class.items()} == {
        "x (1)": pytest.approx(1.0),
        "x (2)": 0.0,
        "y": None,
    }


def test_detections_limit_is_positive():
    with pytest.raises(ValueError, match="max_detections must be at least 1, not 0"):
        evaluate_results(document({1: grid(1)}), [], max_detections=0)


def test_the_table_says_the_limit_and_every_class():
    annotations = document({1: grid(375)}, categories=((1, "cell"), (2, "no such thing")))
    lines = format_table(evaluate_results(annotations, results_of(annotations))).splitlines()
    assert "At most 375 detections of each class in an image" in lines[0]
    assert lines[1].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARmax"]
    assert lines[2].split() == ["bbox", "100.0", "100.0", "100.0", "100.0", "-", "-", "0.3", "2.7", "100.0"]
    assert lines[3].split()[0] == "segm"
    assert lines[-2].split() == ["cell", "100.0", "100.0", "100.0", "100.0"]
    assert lines[-1].split() == ["no", "such", "thing", "-", "-", "-", "-"]
    boxes = format_table(evaluate_results(annotations, results_of(annotations, masks=False)))
    assert "segm" not in boxes


def test_masks_decide_the_size_of_a_found_mask():
    # A wrong detection of a small mask in a large box: among small objects for masks, large ones for boxes.
    annotations = document({1: [(1, (0, 0, 20, 20)), (1, (100, 50, 110, 110))]})
    wrong = {"image_id": 1, "category_id": 1, "bbox": [150, 0, 120, 120], "score": 0.99}
    wrong["segmentation"] = box_mask((280, 0, 10, 10), (200, 300))
    assert rle_areas([wrong["segmentation"]]) == [100]
    evaluation = evaluate_results(annotations, [wrong, *results_of(annotations)])
    assert evaluation.bbox["APs"] == pytest.approx(1.0) and evaluation.bbox["APl"] == pytest.approx(0.5)
    assert evaluation.segm["APs"] == pytest.approx(0.5) and evaluation.segm["APl"] == pytest.approx(1.0)
