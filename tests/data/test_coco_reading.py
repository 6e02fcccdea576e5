"""read_coco: what it takes, what it puts right, and the one line for what it refuses."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest

from dsg.model.data.coco import Annotation, DataError, read_coco
from dsg.model.network.checkpoint import Category

MASK = np.zeros((20, 30), np.uint8)
MASK[4:9, 10:17] = 1
COMPRESSED = {
    "size": [20, 30],
    "counts": pycocotools.mask.encode(np.asfortranarray(MASK))["counts"].decode(),
}
# Down the columns: 10 columns and 4 rows of 0, then 7 columns of 5 ones and 15 zeros.
RUNS = [204] + [5, 15] * 6 + [5, 600 - 204 - 125]


def test_reads_every_kind_of_annotation(make_coco, square):
    path = make_coco(
        [(20, 30), (10, 10), (5, 6)],
        [
            {"bbox": [1, 2, 3, 4], "segmentation": [square(1, 2, 3)], "category_id": 90},
            {"bbox": [10, 4, 7, 5], "segmentation": COMPRESSED, "category_id": 2},
            {"bbox": [10, 4, 7, 5], "segmentation": {"size": [20, 30], "counts": RUNS}, "iscrowd": 1},
            {"bbox": [1, 2, 3, 4], "segmentation": []},
            {"bbox": [1, 2, 3, 4], "image_id": 2},
        ],
        licenses=[{"id": 4, "name": "Attribution"}],
    )
    document = json.loads(path.read_text())
    document["images"][0]["license"] = 4
    path.write_text(json.dumps(document))
    data = read_coco(path)
    assert data.categories == (Category(7, "nut"), Category(2, "fig", "fruit"), Category(90, "date"))
    first, second, third = data.records
    assert (first.id, first.size, first.licence) == (1, (20, 30), "Attribution")
    assert first.path == path.parent / "images" / "0.png"
    assert first.annotations[0] == Annotation((1, 2, 4, 6), 3, [square(1, 2, 3)], False, 1)
    assert first.annotations[1] == Annotation((10, 4, 17, 9), 2, COMPRESSED, False, 2)
    assert first.annotations[2] == Annotation((10, 4, 17, 9), 1, {"size": [20, 30], "counts": RUNS}, True, 3)
    assert first.annotations[3] == Annotation((1, 2, 4, 6), 1, None, False, 4)
    assert second.annotations == (Annotation((1, 2, 4, 6), 1, None, False, 5),)
    assert third.annotations == () and third.licence == ""


def test_images_directory_can_be_another(make_coco, tmp_path):
    data = read_coco(make_coco([(4, 4)]), tmp_path / "elsewhere")
    assert data.records[0].path == tmp_path / "elsewhere" / "0.png"


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[1.5, 2, 8, 2, 8, 9.25]], (1.5, 2, 8, 9.25)),
        (COMPRESSED, (10, 4, 17, 9)),
        ({"size": [20, 30], "counts": RUNS}, (10, 4, 17, 9)),
    ],
)
@pytest.mark.parametrize("bbox", [{}, {"bbox": []}, {"bbox": None}])
def test_missing_bbox_comes_from_the_mask(make_coco, segmentation, box, bbox):
    data = read_coco(make_coco([(20, 30)], [{"segmentation": segmentation, **bbox}]))
    assert data.records[0].annotations[0].box == box


@pytest.mark.parametrize(
    ("annotation", "kept", "told"),
    [
        ({"bbox": [0, 0, 30, 20]}, (0, 0, 30, 20), ""),
        ({"bbox": [-0.4, 1, 10, 19.6]}, (0, 1, 9.6, 20), ""),
        ({"bbox": [-5, 1, 10, 2]}, (0, 1, 5, 3), "clipped, the box reaches out of the picture"),
        ({"bbox": [40, 1, 10, 2]}, None, "dropped, the box is outside the picture"),
        ({"bbox": [4, 1, 0, 2]}, None, "dropped, the box is without an area"),
        (
            {"bbox": [4, 1, 5, 2], "segmentation": [[1, 2, 3, 4]]},
            (4, 1, 9, 3),
            "used as a box only, polygons",
        ),
        ({"bbox": [4, 1, 5, 2], "segmentation": [[1, 1, 2, 2, 3, 3]]}, (4, 1, 9, 3), "used as a box only"),
        ({"bbox": [4, 1, 5, 2], "segmentation": [[]]}, (4, 1, 9, 3), "used as a box only"),
        (
            {"bbox": [4, 1, 5, 2], "segmentation": {"size": [20, 30], "counts": [600]}},
            (4, 1, 9, 3),
            "box only",
        ),
    ],
)
def test_puts_right_and_logs_how_often(make_coco, caplog, annotation, kept, told):
    caplog.set_level(logging.INFO)
    (record,) = read_coco(make_coco([(20, 30)], [annotation])).records
    assert [one.box for one in record.annotations] == ([] if kept is None else [pytest.approx(kept)])
    assert all(one.segmentation is None for one in record.annotations)
    if told:
        assert told in caplog.text and "1 annotations" in caplog.text
    else:
        assert not caplog.text


def test_one_bad_polygon_of_two_is_left_out(make_coco, square):
    (record,) = read_coco(make_coco([(20, 30)], [{"segmentation": [[1, 2, 3, 4], square(1, 1, 5)]}])).records
    assert record.annotations[0].segmentation == [square(1, 1, 5)]


def test_polygon_that_crosses_itself_evenly_is_kept(make_coco):
    bow_tie = [0, 0, 10, 10, 10, 0, 0, 10]
    (record,) = read_coco(make_coco([(20, 30)], [{"segmentation": [bow_tie]}])).records
    assert record.annotations[0].segmentation == [bow_tie]


BOX = {"bbox": [1, 1, 2, 2]}
ODD = [[1, 1, 5, 1, 5, 5, 9]]


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        ({"id": "x", **BOX}, "annotation at index 0 has no whole number as 'id'"),
        ({"image_id": 99, **BOX}, "annotation 1: image_id is 99, no image has that id"),
        ({"image_id": None, **BOX}, "annotation 1: image_id is None"),
        ({"category_id": 1, **BOX}, "annotation 1: category_id is 1, no category has that id"),
        ({"category_id": [7], **BOX}, r"annotation 1: category_id is \[7\]"),
        ({"iscrowd": 2, **BOX}, "annotation 1: iscrowd is 2"),
        ({"bbox": [1, 1, 2]}, "annotation 1: bbox is .*, not"),
        ({"bbox": [1, 1, "2", 2]}, "annotation 1: bbox is .*, not"),
        ({"bbox": "1 1 2 2"}, "annotation 1: bbox is .*, not"),
        ({"bbox": [1, 1, True, 2]}, "annotation 1: bbox is .*, not"),
        ({"bbox": [1, float("nan"), 2, 2]}, "annotation 1: bbox .* not finite"),
        ({"bbox": [1, 1, float("inf"), 2]}, "annotation 1: bbox .* not finite"),
        ({"bbox": [1, 1, 10**400, 2]}, "annotation 1: bbox .* far too large"),
        ({"bbox": [9, 9, -3, 2]}, "annotation 1: bbox .* negative width or height"),
        ({}, "annotation 1: has neither a bbox nor a mask"),
        ({**BOX, "segmentation": 5}, "annotation 1: segmentation is a int"),
        ({**BOX, "segmentation": [1, 1, 5, 1, 5, 5]}, "annotation 1: segmentation is one flat list"),
        ({**BOX, "segmentation": ODD}, r"annotation 1: a polygon has an odd number of coordinates \(7\)"),
        ({**BOX, "segmentation": [[1, 1, 5, None]]}, "annotation 1: a polygon holds something that is not"),
        ({**BOX, "segmentation": [[1, 1, 5, 10**400]]}, "annotation 1: a polygon holds .* too large"),
        ({**BOX, "segmentation": [[1, 1, 5, float("nan")]]}, "annotation 1: a polygon has .* not finite"),
        ({**BOX, "segmentation": [[1, 1, 5e9, 1, 5, 5]]}, "annotation 1: a polygon has .* far too large"),
        ({**BOX, "segmentation": [{"x": 1}]}, "annotation 1: a polygon is dict"),
        ({**BOX, "segmentation": {"counts": [600]}}, "annotation 1: RLE size is None"),
        (
            {**BOX, "segmentation": {"size": [30, 20], "counts": [600]}},
            r"RLE size .* \[20, 30\]",
        ),
        ({**BOX, "segmentation": {"size": [20, 30]}}, "annotation 1: RLE counts must be"),
        ({**BOX, "segmentation": {"size": [20, 30], "counts": [1.5]}}, "annotation 1: RLE counts must be"),
        ({**BOX, "segmentation": {"size": [20, 30], "counts": [599]}}, "RLE runs cover 599 pixels, .* 600"),
        ({**BOX, "segmentation": {"size": [20, 30], "counts": [-1, 601]}}, "RLE counts hold a negative run"),
        ({**BOX, "segmentation": {"size": [20, 30], "counts": "me;4j7"}}, "RLE (runs|counts)"),
        ({**BOX, "segmentation": {"size": [20, 30], "counts": "\u00e9"}}, "RLE counts hold a character"),
        ({**BOX, "segmentation": {"size": [20, 30], "counts": "\x01"}}, "RLE counts are cut off or hold"),
        (
            {**BOX, "segmentation": {"size": [20, 30], "counts": "ooooooooo0"}},
            "longer than any picture",
        ),
    ],
)
def test_broken_annotation_is_one_line_with_file_and_id(make_coco, annotation, told):
    path = make_coco([(20, 30)], [annotation])
    with pytest.raises(DataError, match=told) as caught:
        read_coco(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


IMAGE = {"id": 1, "file_name": "a.png", "height": 4, "width": 4}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": 5}, "'images' is no list"),
        ({"annotations": None}, "'annotations' is no list"),
        ({"images": []}, "has no image"),
        ({"categories": []}, "has no category"),
        ({"images": [5]}, "image at index 0 has no whole number"),
        ({"images": [{**IMAGE, "id": "1"}]}, "image at index 0 has no whole number"),
        ({"images": [IMAGE, IMAGE]}, "image 1: its id is used twice"),
        ({"images": [{**IMAGE, "file_name": ""}]}, "image 1: has no 'file_name'"),
        ({"images": [{**IMAGE, "height": 0}]}, "image 1: height and width are 0 and 4"),
        ({"images": [{**IMAGE, "width": 4.5}]}, "image 1: height and width are 4 and 4.5"),
        ({"categories": [{"id": 1}]}, "category at index 0 needs"),
        ({"categories": [{"id": True, "name": "a"}]}, "category at index 0 needs"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category id 1 is used twice"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "name 'a' is used twice"),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 7, **BOX}] * 2},
            "its id is used twice",
        ),
        ({"annotations": ["x"]}, "annotation at index 0"),
    ],
)
def test_broken_file_is_one_line(make_coco, change, told):
    path = make_coco([(4, 4)])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=told) as caught:
        read_coco(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[]", "holds a list, not a COCO object"),
        ("{}", "has no 'images'"),
        ('{"images": []}', "has no 'annotations'"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_what_is_no_coco_file(tmp_path: Path, text: Any, told: str):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=told) as caught:
        read_coco(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_coco(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(tmp_path)


def test_licences_of_any_shape_do_no_harm(make_coco):
    path = make_coco([(4, 4)], licenses=[{"id": [1], "name": "a"}, {"name": "b"}, 5])
    document = json.loads(path.read_text())
    document["images"][0]["license"] = 3
    path.write_text(json.dumps(document))
    assert read_coco(path).records[0].licence == "3"


DATA = os.environ.get("DSG_DATA_DIR")


@pytest.mark.skipif(not DATA, reason="DSG_DATA_DIR names no folder of COCO sets")
@pytest.mark.slow
def test_real_sets_are_read():
    files = sorted(Path(str(DATA)).glob("*/*.json"))
    assert files
    for path in files:
        data, raw = read_coco(path), json.loads(path.read_text())
        assert len(data.records) == len(raw["images"])
        assert sum(len(record.annotations) for record in data.records) == len(raw["annotations"])
