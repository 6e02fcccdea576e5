"""Semantic maps beside pictures: they go through the same views, and say which pixels are unknown."""

import numpy as np
import pytest
import torch
from PIL import Image

from dsg.model.data.coco import read_coco
from dsg.model.data.copy_paste import copy_paste
from dsg.model.data.dataset import CocoDataset
from dsg.model.data.records import DataError
from dsg.model.data.transforms import Augment, AugmentConfig


@pytest.fixture
def coco(make_coco, square):
    return make_coco([(20, 30), (24, 16)], [{"segmentation": [square(2, 3, 6)], "bbox": [2, 3, 6, 6]}])


@pytest.fixture
def maps(tmp_path):
    """Each map holds the number of its row."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for name, (height, width) in (("0", (20, 30)), ("1", (24, 16))):
        rows = np.repeat(np.arange(height, dtype=np.uint8)[:, None], width, axis=1)
        Image.fromarray(rows).save(folder / f"{name}.png")
    return folder


def test_as_they_are_and_turned(coco, maps):
    data = read_coco(coco)
    _, target = CocoDataset(data, maps=maps)[0]
    assert target["semantic"].dtype == torch.uint8 and target["semantic"].shape == (20, 30)
    assert target["semantic"][:, 0].tolist() == list(range(20))
    upside_down = Augment(AugmentConfig(short_sides=(), horizontal_flip=0, vertical_flip=1))
    _, target = CocoDataset(data, upside_down, maps=maps)[0]
    assert target["semantic"][:, 0].tolist() == list(range(19, -1, -1))
    twice = Augment(AugmentConfig(crop_size=64, scale_range=(60 / 64, 60 / 64), horizontal_flip=0))
    image, target = CocoDataset(data, twice, maps=maps)[0]
    assert image.shape[1:] == target["semantic"].shape == (64, 64)
    assert target["semantic"][:40, 0].tolist() == [row for row in range(20) for _ in (0, 1)]
    assert (target["semantic"][40:] == 255).all() and (target["semantic"][:, 60:] == 255).all()


def test_pasted_objects_are_unknown(coco, maps):
    data = read_coco(coco)
    dataset = CocoDataset(data, maps=maps)
    _, target = copy_paste(dataset[1], dataset[0], np.random.default_rng(0))
    assert (target["semantic"][3:9, 2:8] == 255).all() and int((target["semantic"] == 255).sum()) == 36


def test_what_is_missing_or_wrong_is_named(coco, maps):
    data = read_coco(coco)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(maps / "1.png")
    with pytest.raises(DataError, match=r"1\.png: must be 8-bit grey or palette of \(24, 16\)"):
        CocoDataset(data, maps=maps)[1]
    (maps / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png: cannot be read as a map"):
        CocoDataset(data, maps=maps)[1]
    (maps / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png: no such map .* batch\.stuff_maps"):
        CocoDataset(data, maps=maps)
