"""check_file: all findings, each on a line of its own, and the counts."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dsg.model.data.coco import DataError, check_file


def test_a_sound_file(make_coco, square):
    path = make_coco(
        [(20, 30), (10, 12), (5, 6)],
        [
            {"segmentation": [square(1, 1, 5)]},
            {"segmentation": [square(1, 1, 5)], "category_id": 90},
            {"bbox": [1, 1, 2, 2]},
            {"image_id": 2, "segmentation": [square(1, 1, 5)], "iscrowd": 1},
        ],
    )
    seen = []
    report = check_file(path, on_progress=lambda done, total: seen.append((done, total)))
    assert report.ok and report.problems == ()
    assert (report.images, report.empty_images, report.objects) == (3, 1, 3)
    assert (report.with_mask, report.crowd_regions, report.fullest_image) == (2, 1, 3)
    assert (report.smallest, report.largest) == ((5, 6), (20, 30))
    assert report.per_category == (("nut", 2), ("fig", 0), ("date", 1))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    text = "\n".join(report.summary())
    for part in ("3 images (1 without objects)", "3 objects (2 with masks), 1 crowd regions", "5 x 6 to 20 x 30"):
        assert part in text
    assert "nut 2, date 1" in text and "categories without objects: fig" in text
    assert "0 errors, 0 warnings" in text


def test_every_problem_is_found_at_once(make_coco, square):
    path = make_coco(
        [(20, 30), (20, 30), (20, 30), (20, 30)],
        [
            {"bbox": [1, 1, 2, 2], "category_id": 5},
            {"bbox": [1, 1, 2, 2], "image_id": 17},
            {"bbox": [1, 1, 2, 2], "id": 1},
            {"bbox": [9, 9, -2, 2]},
            {"bbox": [float("nan"), 9, 2, 2]},
            {"bbox": [40, 9, 2, 2]},
            {"bbox": [25, 9, 20, 2]},
            {"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 2, 2]]},
            {"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 2, 2, 3]]},
            {"bbox": [1, 1, 4, 4], "segmentation": {"size": [20, 30], "counts": "04X"}},
            {"bbox": [1, 1, 4, 0], "segmentation": []},
            {"segmentation": [square(1, 1, 5)]},
        ],
    )
    document = json.loads(path.read_text())
    document["images"].append({**document["images"][0]})
    document["categories"].append({"id": 7, "name": "again"})
    path.write_text(json.dumps(document))
    images = path.parent / "images"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((20, 29), np.uint8)).save(images / "3.png")

    report = check_file(path)
    assert not report.ok
    expected_errors = [
        "category id 7 is used twice",
        "image 1: its id is used twice",
        "annotation 1: category_id is 5",
        "annotation 2: image_id is 17",
        "annotation 1: its id is used twice",
        "annotation 4: bbox .* negative",
        "annotation 5: bbox .* not finite",
        "annotation 9: a polygon has an odd number",
        "annotation 10: RLE",
        "image 2: .*1.png: no such picture",
        "image 3: .*2.png: cannot be decoded",
        "image 4: .*3.png: is 20 x 29",
    ]
    expected_warnings = [
        "annotation 6: box .* outside the picture .* dropped",
        "annotation 7: box .* reaches out of the picture .* clipped",
        "annotation 8: 1 of 1 polygons have fewer than 3 points",
        "annotation 11: box .* without an area .* dropped",
    ]
    for found, expected in ((report.errors, expected_errors), (report.warnings, expected_warnings)):
        assert len(found) == len(expected), found
        for line, pattern in zip(found, expected, strict=True):
            assert line.startswith(f"{path}: ") and "\n" not in line
            assert re.search(pattern, line), (line, pattern)
    assert report.problems == report.errors + report.warnings
    assert "12 errors, 4 warnings" in report.summary()[-1]
    # What is counted is what training would use.
    assert (report.images, report.objects, report.with_mask) == (4, 3, 1)


def test_no_images_directory_is_one_error(make_coco, tmp_path):
    report = check_file(make_coco([(4, 4), (4, 4)]), tmp_path / "elsewhere")
    assert len(report.errors) == 1 and "no such images directory" in report.errors[0]


def test_no_usable_image(make_coco):
    path = make_coco([])
    report = check_file(path)
    assert "has no image that can be used" in report.errors[0]
    assert report.smallest == report.largest == (0, 0) and report.fullest_image == 0


def test_what_is_no_coco_file_raises(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(DataError, match="holds a list"):
        check_file(path)
