"""A checkpoint that finds something in every picture, a photo, and the command line as a function."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dsg.cli.main import run
from dsg.model import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint


class Ran(NamedTuple):
    """What one command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `dsg ARGUMENTS` in this process."""

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lite network with random weights, two classes with ids that are no labels, at most 5 detections."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    overrides = {"max_detections": 5}
    info = CheckpointInfo(
        name="random",
        preset="mask_rcnn_lite0_fpn",
        overrides=overrides,
        categories=(Category(7, "nut"), Category(3, "bolt")),
        resize=Resize(128, 160),
        score_threshold=0.0,
        max_detections=5,
        licence="Apache-2.0",
    )
    save_checkpoint(path, build("mask_rcnn_lite0_fpn", 2, **overrides), info)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of noise, 120 x 150."""
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """A COCO file with 3 pictures of noise, 90 x 120, in images/ beside it; the third shows no object."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in (1, 2, 3):
        noise = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    objects = [(1, 7, [10, 10, 40, 30]), (1, 3, [60, 40, 30, 30]), (2, 3, [20, 20, 50, 50])]
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 90, "width": 120} for n in (1, 2, 3)],
        "categories": [{"id": 7, "name": "nut"}, {"id": 3, "name": "bolt"}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            for number, (image_id, category_id, (x, y, w, h)) in enumerate(objects, start=1)
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(document))
    return path
