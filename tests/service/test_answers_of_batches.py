"""A real model behind a real server: answers do not depend on batch mates, and their AP is that of `dsg eval`."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from service_process import ServerProcess, server_process

from dsg.cli.main import run
from dsg.model import build, load
from dsg.model.network.checkpoint import Resize, save_checkpoint

SIZE = (256, 320)  # (height, width)
ANSWERS_S = 280


def nuclei(seed: int) -> tuple[bytes, list[tuple[int, int, int, int]]]:
    """A picture of bright ellipses on black, a PNG, and their boxes (x1, y1, x2, y2)."""
    chance = np.random.default_rng(seed)
    height, width = SIZE
    image = Image.new("RGB", (width, height), (8, 8, 8))
    draw = ImageDraw.Draw(image)
    boxes = []
    for row in range(3):
        for column in range(4):
            side_x, side_y = (int(v) for v in chance.integers(18, 44, 2))
            x = column * 80 + int(chance.integers(4, 80 - side_x))
            y = row * 85 + int(chance.integers(0, 85 - side_y))
            grey = int(chance.integers(110, 250))
            draw.ellipse((x, y, x + side_x, y + side_y), fill=(grey, grey, grey))
            boxes.append((x, y, x + side_x + 1, y + side_y + 1))
    pixels = np.asarray(image).astype(int) + chance.integers(-6, 7, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue(), boxes


PICTURES = [nuclei(seed)[0] for seed in range(16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the package for nuclei, with few proposals and small pictures: sixteen at once are quick then."""
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    trained = load("dsg_lite0_nuclei", "cpu")
    overrides = {**trained.info.overrides, "proposals": 48, "max_detections": 40}
    info = replace(trained.info, overrides=overrides, resize=Resize(192, 240), max_detections=40)
    network = build(info.preset, len(info.categories), **overrides)
    network.load_state_dict(trained.model.state_dict())
    save_checkpoint(path, network, info)
    return str(path)


@dataclass(frozen=True)
class Place:
    """Where a server computes, and how near answers of different batches must be."""

    device: str
    precision: str = "float32"
    iou: float = 0.999
    score: float = 1e-3


ON_GPU = [
    pytest.param(Place("cuda"), marks=pytest.mark.gpu, id="cuda-float32"),
    # Half precision rounds differently with the size of a batch: a pixel at the edge of a small mask may change.
    pytest.param(Place("cuda", "float16", 0.99, 5e-3), marks=pytest.mark.gpu, id="cuda-float16"),
]


@pytest.fixture(scope="module", params=[pytest.param(Place("cpu"), id="cpu"), *ON_GPU])
def place(request: pytest.FixtureRequest) -> Place:
    chosen: Place = request.param
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return chosen


@pytest.fixture(scope="module")
def server(place: Place, model: str) -> Iterator[ServerProcess]:
    settings = {"max_batch": 16, "deadline_ms": ANSWERS_S * 1000, "precision": place.precision}
    with server_process(model=model, device=place.device, **settings) as running:
        yield running


def segment(server: ServerProcess, pictures: list[bytes], **query: Any) -> dict[str, Any]:
    files = [("image", (f"{number}.png", data, "image/png")) for number, data in enumerate(pictures)]
    response = httpx.post(f"{server.url}/segment", files=files, params=query, timeout=ANSWERS_S)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def annotations(document: dict[str, Any], image_id: int) -> list[dict[str, Any]]:
    return [one for one in document["annotations"] if one["image_id"] == image_id]


def test_a_picture_alone_and_among_fifteen_others(server: ServerProcess, place: Place) -> None:
    together = segment(server, PICTURES)
    assert server.metrics()['dsg_batch_size_bucket{le="16.0"}'] > server.metrics()['dsg_batch_size_bucket{le="12.0"}']
    for index in (0, 15):
        alone = segment(server, [PICTURES[index]])["annotations"]
        among = annotations(together, index + 1)
        assert len(alone) == len(among) >= 5
        for one, other in zip(alone, among, strict=True):
            assert one["category_id"] == other["category_id"]
            assert one["score"] == pytest.approx(other["score"], abs=place.score)
            iou = coco_mask.iou([one["segmentation"]], [other["segmentation"]], [0])
            assert iou[0, 0] >= place.iou


def test_ap_of_answers_is_that_of_dsg_eval(server: ServerProcess, place: Place, model: str, tmp_path: Path) -> None:
    images, truth, answers = [], [], []
    for image_id in range(1, 5):
        data, boxes = nuclei(100 + image_id)
        (tmp_path / f"{image_id}.png").write_bytes(data)
        height, width = SIZE
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
        for x1, y1, x2, y2 in boxes:
            canvas = Image.new("1", (width, height))
            ImageDraw.Draw(canvas).ellipse((x1, y1, x2 - 1, y2 - 1), fill=1)
            rle = coco_mask.encode(np.asfortranarray(np.asarray(canvas), np.uint8))
            rle["counts"] = rle["counts"].decode()
            box = [x1, y1, x2 - x1, y2 - y1]
            area = int(np.asarray(canvas).sum())
            truth.append(
                {"id": len(truth) + 1, "image_id": image_id, "category_id": 1, "bbox": box, "area": area}
                | {"segmentation": rle, "iscrowd": 0}
            )
        found = segment(server, [data], score_threshold=0.001)
        answers += [{**one, "image_id": image_id} for one in found["annotations"]]
    categories = [{"id": one["id"], "name": one["name"]} for one in found["categories"]]
    truth = [{**one, "category_id": categories[0]["id"]} for one in truth]
    gold = tmp_path / "truth.json"
    gold.write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    common = ["--annotations", str(gold), "--max-detections", "40"]
    network = ["--model", model, "--device", place.device, "--precision", place.precision]
    by_model, by_answers = tmp_path / "model.json", tmp_path / "served.json"
    assert run(["eval", *network, "--images", str(tmp_path), *common, "--out", str(by_model)]) == 0
    assert run(["eval", "--predictions", str(tmp_path / "answers.json"), *common, "--out", str(by_answers)]) == 0
    evaluated, served = json.loads(by_model.read_text()), json.loads(by_answers.read_text())
    for kind in ("bbox", "segm"):
        assert evaluated[kind]["AP"] > 0.1  # they are found at all
        for name, value in evaluated[kind].items():
            assert served[kind][name] == pytest.approx(value, abs=0.002), (kind, name)
