"""`dsg predict` on files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO


def test_results_load_in_pycocotools(command: Callable, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = command("predict", photo, "--model", checkpoint, "--out", out, "--device", "cpu")
    assert ran.code == 0, ran.err
    results = json.loads((out / "predictions.json").read_text())
    assert 0 < len(results) <= 5
    assert {result["image_id"] for result in results} == {1}
    assert {result["category_id"] for result in results} <= {7, 3}
    assert {result["file_name"] for result in results} == {str(photo)}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "width": 150, "height": 120}],
        "categories": [{"id": 3, "name": "bolt"}, {"id": 7, "name": "nut"}],
        "annotations": [],
    }
    truth.createIndex()
    loaded = truth.loadRes([{k: v for k, v in result.items() if k != "file_name"} for result in results])
    assert all(loaded.annToMask(annotation).shape == (120, 150) for annotation in loaded.anns.values())
    overlay = np.asarray(Image.open(out / "photo.png"))
    assert overlay.shape == (120, 150, 3)
    assert not np.array_equal(overlay, np.asarray(Image.open(photo)))


def test_folders_and_equal_names(command: Callable, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    Image.open(photo).save(folder / "photo.jpg")
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    ran = command("predict", photo, folder, "--model", checkpoint, "--out", out, "--max-detections", 1)
    assert ran.code == 0, ran.err
    assert {path.name for path in out.iterdir()} == {"predictions.json", "photo.png", "photo_2.png"}
    assert [result["image_id"] for result in json.loads((out / "predictions.json").read_text())] == [1, 2]
    assert "1 of 2 pictures" in ran.err and "2 of 2 pictures" in ran.err


def test_mistakes_are_one_line(command: Callable, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("hello")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    for arguments, word in [
        ((tmp_path / "nowhere.jpg", "--model", checkpoint), "nowhere.jpg"),
        ((text, "--model", checkpoint), "text.png"),
        ((empty, "--model", checkpoint), "holds no picture"),
        ((photo, "--model", "no_such_model"), "no_such_model"),
        ((photo, "--model", photo), "photo.png"),
        ((photo, "--model", checkpoint, "--max-detections", 6), "max_detections"),
        ((photo, "--model", checkpoint, "--score-threshold", 1.5), "score_threshold"),
        ((photo, "--model", checkpoint, "--device", "toaster"), "toaster"),
        ((), "images"),
    ]:
        ran = command("predict", *arguments, "--out", out)
        assert ran.code == 2, (arguments, ran)
        assert ran.err.startswith("dsg: error: ") and ran.err.count("\n") == 1 and word in ran.err, ran.err
        assert not ran.out
