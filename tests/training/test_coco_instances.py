"""Annotations and results that are not what they should be, each named in one line."""

import json

import numpy as np
import pytest

from dsg.model.training.evaluation import evaluate_results, max_objects_in_an_image
from dsg.ops.rle import encode_rle, rle_counts


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


BOXES = [(10, 10, 30, 30), (100, 10, 30, 30), (200, 10, 30, 30)]


def annotations_of_three():
    return {
        "images": [{"id": 1, "height": 200, "width": 300}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": list(box), "segmentation": polygon(*box)}
            for i, box in enumerate(BOXES, start=1)
        ],
    }


def results_of_three():
    return [
        {"image_id": 1, "category_id": 1, "bbox": list(box), "score": 0.9, "segmentation": polygon(*box)}
        for box in BOXES
    ]


def test_a_path_to_the_annotations(tmp_path):
    annotations = annotations_of_three()
    path = tmp_path / "val.json"
    path.write_text(json.dumps(annotations))
    assert evaluate_results(path, results_of_three()).bbox["AP"] == pytest.approx(1.0)
    assert max_objects_in_an_image(str(path)) == 3
    path.write_text("{")
    with pytest.raises(ValueError, match=r"val\.json is not JSON"):
        evaluate_results(path, [])
    with pytest.raises(ValueError, match=r"cannot read .*none\.json: No such file"):
        evaluate_results(tmp_path / "none.json", [])


BROKEN_RESULTS = [
    ({"image_id": 99}, r"result 1 \(image 99\): the annotations have no image 99"),
    ({"category_id": 8}, r"result 1 \(image 1\): the annotations have no category 8"),
    ({"bbox": [1, 2, 3]}, r"result 1 \(image 1\): bbox must be four finite numbers"),
    ({"bbox": [1, 2, 3, float("nan")]}, r"result 1 \(image 1\): bbox must be four finite numbers"),
    ({"bbox": [1, 2, -3, 4]}, r"result 1 \(image 1\): bbox must be four finite numbers"),
    ({"bbox": "1234"}, r"result 1 \(image 1\): bbox must be four finite numbers"),
    ({"score": float("nan")}, r"result 1 \(image 1\): score must be a finite number, not nan"),
    ({"score": None}, r"result 1 \(image 1\): score must be a finite number, not None"),
    ({"segmentation": {"size": [200, 300], "counts": "11"}}, r"result 1 \(image 1\): RLE counts add up to 2"),
    ({"segmentation": {"size": [3, 2], "counts": "6"}}, r"result 1 \(image 1\): its mask has size \[3, 2\]"),
    ({"segmentation": [[1, 2, 3, 4]]}, r"result 1 \(image 1\): a polygon must be"),
    ({"segmentation": {"size": [200, 300], "counts": [-1, 60001]}}, r"result 1 \(image 1\): RLE counts hold"),
    ({"segmentation": []}, r"result 0 \(image 1\) has a segmentation and others have none"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_RESULTS)
def test_broken_results_are_named_in_one_line(change, message):
    annotations = annotations_of_three()
    results = results_of_three()
    results[1].update(change)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_results(annotations, results)
    assert "\n" not in str(caught.value)


def test_a_result_of_nothing():
    with pytest.raises(ValueError, match=r"result 0 \(image 1\) has neither bbox nor segmentation"):
        evaluate_results(annotations_of_three(), [{"image_id": 1, "category_id": 1, "score": 0.5}])


BROKEN_ANNOTATIONS = [
    ({"image_id": 99}, "annotation 2 of image 99: the annotations have no image 99"),
    ({"category_id": None}, "annotation 2 of image 1: the annotations have no category None"),
    ({"bbox": [1, 2, 3]}, "annotation 2 of image 1: bbox must be four finite numbers"),
    ({"segmentation": [[1, 2, 3, 4, 5]]}, "annotation 2 of image 1: a polygon must be"),
    (
        {"segmentation": {"size": [200, 300], "counts": [1]}},
        "annotation 2 of image 1: RLE counts add up to 1",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_ANNOTATIONS)
def test_broken_annotations_are_named_in_one_line(change, message):
    annotations = annotations_of_three()
    annotations["annotations"][1].update(change)
    with pytest.raises(ValueError, match=message):
        evaluate_results(annotations, [])


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"images": [], "annotations": []}, "no list 'categories'"),
        ([], "no list 'images'"),
        (
            {"images": [{"id": 1}, {"id": 1}], "categories": [], "annotations": []},
            "image 1 of the annotations",
        ),
        ({"images": [], "categories": [{"id": 1}], "annotations": []}, "category 0 of the annotations"),
    ],
)
def test_broken_files(annotations, message):
    with pytest.raises(ValueError, match=message):
        evaluate_results(annotations, [])


def test_masks_need_the_size_of_their_image():
    annotations = annotations_of_three()
    del annotations["images"][0]["height"]
    with pytest.raises(ValueError, match="annotation 1 of image 1 has a mask, and its image has no height"):
        evaluate_results(annotations, [])


def test_entries_must_be_objects():
    with pytest.raises(ValueError, match="result 0 must be an object with image_id and category_id, not 7"):
        evaluate_results(annotations_of_three(), [7])
    annotations = annotations_of_three()
    annotations["annotations"].append([])
    with pytest.raises(ValueError, match="annotation 3 must be an object"):
        evaluate_results(annotations, [])


def test_every_form_of_a_mask_is_the_same():
    annotations = annotations_of_three()
    masks = [np.zeros((200, 300), dtype=np.bool_) for _ in BOXES]
    for mask, (x, y, w, h) in zip(masks, BOXES, strict=True):
        mask[y : y + h, x : x + w] = True
    compressed, packed, plain = results_of_three(), results_of_three(), results_of_three()
    for index, rle in enumerate(map(encode_rle, masks)):
        compressed[index]["segmentation"] = rle
        packed[index]["segmentation"] = {**rle, "counts": rle["counts"].encode()}
        plain[index]["segmentation"] = {**rle, "counts": rle_counts(rle).tolist()}
    for results in (results_of_three(), compressed, packed, plain):
        assert evaluate_results(annotations, results).segm["AP"] == pytest.approx(1.0)
        annotations["annotations"] = [
            {**one, "segmentation": result["segmentation"]}
            for one, result in zip(annotations["annotations"], results, strict=True)
        ]
        assert evaluate_results(annotations, results_of_three()).segm["AP"] == pytest.approx(1.0)
