"""The command line and the service take an exported file where they take a checkpoint."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import dsg.model
from dsg.cli.main import run


@pytest.fixture(params=["onnx", "torchscript"])
def exported(request, monkeypatch) -> Path:
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    return request.getfixturevalue(f"{request.param}_file").path


@pytest.fixture
def photos(pictures: list[np.ndarray], tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def call(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def same_results(one: list[dict], other: list[dict]) -> None:
    assert [(r["image_id"], r["category_id"]) for r in one] == [(r["image_id"], r["category_id"]) for r in other]
    np.testing.assert_allclose([r["score"] for r in one], [r["score"] for r in other], rtol=0, atol=1e-4)
    np.testing.assert_allclose([r["bbox"] for r in one], [r["bbox"] for r in other], rtol=0, atol=2e-2)


def test_predict(exported, checkpoint, photos, tmp_path) -> None:
    for model, name in ((exported, "file"), (checkpoint, "checkpoint")):
        call("predict", *photos, "--model", model, "--out", tmp_path / name, "--score-threshold", 0.3)
    results = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("file", "checkpoint")]
    assert len(results[0]) > 10 and (tmp_path / "file" / "0.png").is_file()
    same_results(*results)


def test_eval(exported, checkpoint, photos, tmp_path) -> None:
    found = dsg.model.load(checkpoint, "cpu").predict(photos, 0.3)
    truth: dict = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "nut"}, {"id": 3, "name": "bolt"}]}
    truth["categories"].append({"id": 12, "name": "Unterlegscheibe ø"})
    for number, (path, one) in enumerate(zip(photos, found, strict=True), 1):
        height, width = one.image_size
        truth["images"].append({"id": number, "file_name": path.name, "height": height, "width": width})
        for result in one.to_coco(number, [7, 3, 12])[:4]:
            area = result["bbox"][2] * result["bbox"][3]
            truth["annotations"].append({**result, "id": len(truth["annotations"]) + 1, "area": area, "iscrowd": 0})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    scores = []
    for model, name in ((exported, "file.json"), (checkpoint, "checkpoint.json")):
        call(
            "eval",
            "--model",
            model,
            "--annotations",
            tmp_path / "truth.json",
            "--out",
            tmp_path / name,
            "--device",
            "cpu",
        )
        scores.append(json.loads((tmp_path / name).read_text())["segm"]["AP"])
    assert scores[0] > 0.1 and scores[0] == pytest.approx(scores[1], abs=1e-3)


PROGRAM = """
import sys
if sys.argv[1].endswith(".onnx"):
    sys.modules["torch"] = None  # whoever imports it now fails
from dsg.service.run import serve
from dsg.service.settings import Settings
serve(Settings(port=0, model=sys.argv[1], device="cpu"))
"""


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a server process, which ends with the context; one that serves ONNX cannot import torch."""
    command = [sys.executable, "-c", PROGRAM, str(model)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("{") and json.loads(line)["event"] == "serving":
            break
    else:
        raise AssertionError("".join(said))
    try:
        yield json.loads(said[-1])["url"]
    finally:
        process.terminate()
        process.stderr.read()
        assert process.wait() == 0


def test_segment(exported, checkpoint, photos) -> None:
    predictor = dsg.model.load(checkpoint, "cpu")
    files = [("image", (photo.name, photo.read_bytes(), "image/png")) for photo in photos]
    with served(exported) as url:
        answer = httpx.post(f"{url}/segment", files=files, timeout=60)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["info"]["model"] == "model" and document["info"]["hash"] == predictor.info.hash
    assert [category["name"] for category in document["categories"]] == predictor.info.category_names
    found = predictor.predict(photos)
    wanted = [one for number, each in enumerate(found, 1) for one in each.to_coco(number, predictor.info.category_ids)]
    assert len(wanted) > 10
    same_results(document["annotations"], wanted)
    masks = [coco_mask.decode(one["segmentation"]) for one in document["annotations"]]
    own = [coco_mask.decode(one["segmentation"]) for one in wanted]
    assert all((one != other).sum() <= 2 + one.sum() / 1000 for one, other in zip(masks, own, strict=True))
