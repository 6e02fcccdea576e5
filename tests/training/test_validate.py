"""From a predictor over pictures to COCO results and AP."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycoco_mask

from dsg.model.data.coco import read_coco
from dsg.model.data.records import Annotation, CocoData, DataError, ImageRecord
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize
from dsg.model.network.detections import Detections
from dsg.model.network.predictor import PreparedImage
from dsg.model.training.distributed import Ranks, share_of
from dsg.model.training.validate import Validation, ground_truth, matching_ids, results_of


def box_detections(boxes, labels, size, scores=None):
    """Detections whose masks fill their boxes."""
    n = len(boxes)
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
        scores=torch.linspace(0.9, 0.5, n) if scores is None else torch.tensor(scores),
        labels=torch.tensor(labels, dtype=torch.int64),
        mask_probs=torch.ones(n, 28, 28),
        image_size=size,
    )


class FakePredictor:
    """Answers by the picture's mean colour; keeps which padded sizes came together."""

    def __init__(self, answers):
        self.answers, self.batches = answers, []

    def prepare(self, image):
        assert isinstance(image, np.ndarray) and image.dtype == np.uint8
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        padded = tuple(-(-side // 32) * 32 for side in image.shape[:2])
        return PreparedImage(pixels, image.shape[:2], padded)

    def detect(self, prepared):
        self.batches.append([one.padded_size for one in prepared])
        return [self.answers(int(one.pixels[0].float().mean().round()), one.original_size) for one in prepared]


def pictures(folder, sizes):
    """Pictures 1, 2, ... of the colour of their number."""
    records = []
    for number, (height, width) in enumerate(sizes, start=1):
        path = folder / f"{number}.png"
        Image.new("RGB", (width, height), (number, 0, 0)).save(path)
        records.append(ImageRecord(number, path, height, width, ()))
    return records


def test_results_of_many_sizes(tmp_path):
    sizes = [(40, 30), (30, 40), (40, 31), (64, 64), (41, 30), (33, 64), (40, 29)]
    predictor = FakePredictor(lambda n, size: box_detections([[1, 2, n + 2, 12]], [1], size, [n / 10]))
    done = []
    results = results_of(
        predictor,
        pictures(tmp_path, sizes),
        [17],
        score_threshold=0.2,
        max_detections=5,
        batch=2,
        threads=3,
        on_picture=lambda: done.append(1),
    )
    assert sum(done) == 7
    found = {result["image_id"]: result for result in results}
    assert set(found) == {2, 3, 4, 5, 6, 7}  # picture 1 scores below the threshold
    for number, result in found.items():
        assert result["category_id"] == 17
        assert result["bbox"] == [1.0, 2.0, number + 1.0, 10.0]
        assert result["score"] == pytest.approx(number / 10)
        assert result["segmentation"]["size"] == list(sizes[number - 1])
    for batch in predictor.batches:
        assert len(batch) <= 2 and len(set(batch)) == 1  # pictures of one padded size only
    assert sum(map(len, predictor.batches)) == 7


def test_labels_without_an_id_are_left_out_and_the_cap_holds(tmp_path):
    boxes = [[0, 0, 5, 5], [5, 5, 20, 20], [9, 9, 30, 30]]
    predictor = FakePredictor(lambda n, size: box_detections(boxes, [1, 2, 1], size))
    records = pictures(tmp_path, [(32, 32)])
    results = results_of(predictor, records, [None, 4], score_threshold=0.0, max_detections=2)
    assert [(one["category_id"], one["bbox"]) for one in results] == [(4, [5.0, 5.0, 15.0, 15.0])]


def test_a_broken_picture_is_named(tmp_path):
    records = pictures(tmp_path, [(32, 32), (32, 32)])
    records[1].path.write_bytes(b"no picture")
    predictor = FakePredictor(lambda n, size: box_detections([], [], size))
    with pytest.raises(DataError, match=r"2.png"):
        results_of(predictor, records, [1], score_threshold=0.0, max_detections=2)


def test_the_frame_is_that_of_the_annotations(tmp_path):
    """A stored picture with an orientation tag, annotated as stored, is not turned on its way to the
    network."""
    path = tmp_path / "1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), (1, 0, 0)).save(path, exif=exif)
    sizes = []
    predictor = FakePredictor(lambda n, size: sizes.append(size) or box_detections([], [], size))
    results_of(predictor, [ImageRecord(1, path, 32, 64, ())], [1], score_threshold=0.0, max_detections=2)
    assert sizes == [(32, 64)]


def test_categories_match_by_name():
    own = [Category(1, "cat"), Category(2, "dog"), Category(3, "cow")]
    assert matching_ids(own, [Category(9, "cow"), Category(5, "cat")]) == [5, None, 9]
    with pytest.raises(ValueError, match=r"knows cat, dog, cow, the annotations ant: no name in common"):
        matching_ids(own, [Category(1, "ant")])
    many = [Category(n, f"c{n}") for n in range(9)]
    with pytest.raises(ValueError, match=r"c0, c1, c2 and 6 more"):
        matching_ids(own, many)


def test_ground_truth_keeps_everything(tmp_path):
    polygons = [[2.0, 2.0, 20.0, 2.0, 20.0, 12.0], [10.0, 15.0, 25.0, 15.0, 25.0, 30.0, 10.0, 30.0]]
    mask = np.zeros((32, 40), np.uint8)
    mask[3:9, 4:30] = 1
    counts = [int(n) for n in np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2])))]
    runs = [0, *counts] if mask[0, 0] else counts
    compressed = pycoco_mask.encode(np.asfortranarray(mask))
    segmentations = [
        polygons,
        {"size": [32, 40], "counts": runs},
        {"size": [32, 40], "counts": compressed["counts"].decode()},
        None,
    ]
    annotations = tuple(
        Annotation((1.0, 2.0, 31.0, 30.0), 2, segmentation, number == 1, 100 + number)
        for number, segmentation in enumerate(segmentations)
    )
    categories = (Category(8, "a", "x"), Category(3, "b"))
    data = CocoData((ImageRecord(5, tmp_path / "p.png", 32, 40, annotations),), categories)
    document = ground_truth(data)

    assert document["images"] == [{"id": 5, "file_name": "p.png", "height": 32, "width": 40}]
    assert document["categories"][0] == {"id": 8, "name": "a", "supercategory": "x"}
    found = document["annotations"]
    assert [one["id"] for one in found] == [1, 2, 3, 4]
    assert all(one["bbox"] == [1.0, 2.0, 30.0, 28.0] and one["category_id"] == 3 for one in found)
    assert [one["iscrowd"] for one in found] == [0, 1, 0, 0]
    drawn = pycoco_mask.merge(pycoco_mask.frPyObjects(polygons, 32, 40))
    assert found[0]["area"] == pycoco_mask.area(drawn)
    assert np.array_equal(pycoco_mask.decode(found[0]["segmentation"]), pycoco_mask.decode(drawn))
    for one in found[1:3]:
        assert one["area"] == mask.sum()
        assert np.array_equal(pycoco_mask.decode(one["segmentation"]), mask)
    assert found[3]["area"] == 30 * 28 and found[3]["segmentation"] == []
    json.dumps([{**one, "segmentation": None} for one in found])  # plain numbers only


def info_for(categories, most=100):
    return CheckpointInfo("n", "dsg_lite0_fpn", {}, tuple(categories), Resize(64, 64), 0.5, 0.001, most)


class Perfect(torch.nn.Module):
    """Gives the boxes of the file, without class confusion, for pictures that it knows by size."""

    def __init__(self, data, wrong=False):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(()))
        self.by_size = {record.size: record for record in data.records}
        self.wrong = wrong

    def forward(self, images):
        found = []
        for image in images:
            record = self.by_size[tuple(image.shape[-2:])]
            labels = [one.category_id for one in record.annotations]
            labels = [3 - label for label in labels] if self.wrong else labels
            found.append(box_detections([one.box for one in record.annotations], labels, record.size))
        return found


@pytest.fixture
def boxes_set(tmp_path):
    """Two pictures, one class each as boxes filled with mask; ids 7 and 3."""
    (tmp_path / "images").mkdir()
    document = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}]}
    for number, (height, width) in enumerate([(64, 48), (40, 64)], start=1):
        Image.new("RGB", (width, height)).save(tmp_path / "images" / f"{number}.png")
        document["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for category, (x, y, w, h) in ((7, (2, 3, 20, 18)), (3, (24, 20, 20, 15))):
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    (tmp_path / "set.json").write_text(json.dumps(document))
    return read_coco(tmp_path / "set.json")


def test_a_perfect_network_has_ap_one_and_a_wrong_one_none(boxes_set):
    validation = Validation(boxes_set, info_for(boxes_set.categories), Ranks(), batch=2, threads=2, max_detections=0)
    assert validation.max_detections == 100 and validation.fullest == 2
    good = validation(Perfect(boxes_set).eval())
    assert set(good) == {"AP", "segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50"}
    assert good["bbox/AP"] == pytest.approx(1.0) and good["AP"] == good["segm/AP"] > 0.9
    assert validation(Perfect(boxes_set, wrong=True).eval())["AP"] == 0.0


def test_the_networks_labels_may_come_in_another_order(boxes_set):
    """Labels follow the training file; validation matches names, whatever ids and order its own file has."""
    turned = boxes_set.categories[::-1]
    validation = Validation(boxes_set, info_for(turned), Ranks(), batch=2, threads=1, max_detections=0)
    assert validation(Perfect(boxes_set, wrong=True).eval())["bbox/AP"] == pytest.approx(1.0)


def test_thresholds_are_chosen_where_a_precision_is_asked_for(boxes_set):
    options = {"batch": 2, "threads": 1, "max_detections": 0}
    info = info_for(boxes_set.categories)
    without = Validation(boxes_set, info, Ranks(), **options)
    without(Perfect(boxes_set).eval())
    assert without.info == info
    validation = Validation(boxes_set, info, Ranks(), **options, precision=0.8)
    assert validation.info == info
    validation(Perfect(boxes_set).eval())
    # each picture's first object is of class a and scores .9, its second is of b and scores .5; all are right
    best, second = (np.float32(score).item() for score in (0.9, 0.5))
    assert validation.info.class_thresholds == (best, second)
    assert (validation.info.score_threshold, validation.info.class_precision) == (second, 0.8)
    validation(Perfect(boxes_set, wrong=True).eval())  # what counts is the last validation
    nothing = float(np.nextafter(np.float32(0.9), np.float32(1)))
    assert validation.info.class_thresholds == (nothing, nothing)


def test_boxes_alone_are_measured_by_boxes(boxes_set):
    bare = dataclasses.replace(
        boxes_set,
        records=tuple(
            dataclasses.replace(
                record,
                annotations=tuple(dataclasses.replace(one, segmentation=None) for one in record.annotations),
            )
            for record in boxes_set.records
        ),
    )
    validation = Validation(bare, info_for(bare.categories), Ranks(), batch=2, threads=1, max_detections=0)
    metrics = validation(Perfect(bare).eval())
    assert metrics["AP"] == metrics["bbox/AP"] == pytest.approx(1.0)
    assert "segm/AP" not in metrics


def test_shares_of_processes_cover_every_picture_once():
    shares = [share_of(range(10), Ranks(rank, 3, rank)) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(10))
