"""`dsg eval` and `dsg data check` on a small COCO file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

METRICS = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARmax"}


def perfect(annotations: Path, *keys: str) -> list[dict]:
    """The annotations as results of score 1, with only these keys beside the ids."""
    kept = ("image_id", "category_id", *keys)
    document = json.loads(annotations.read_text())
    return [{**{key: one[key] for key in kept}, "score": 1.0} for one in document["annotations"]]


def test_perfect_predictions(command: Callable, annotations: Path, tmp_path: Path) -> None:
    predictions, out = tmp_path / "results.json", tmp_path / "deep" / "eval.json"
    predictions.write_text(json.dumps(perfect(annotations, "bbox", "segmentation")))
    ran = command("eval", "--predictions", predictions, "--annotations", annotations, "--out", out)
    assert ran.code == 0, ran.err
    assert "100 detections" in ran.out
    document = json.loads(out.read_text())
    assert set(document) == {"max_detections", "bbox", "segm", "per_class"}
    assert document["max_detections"] == 100
    assert set(document["bbox"]) == set(document["segm"]) == METRICS
    assert document["bbox"]["AP"] == pytest.approx(1) and document["segm"]["AP"] == pytest.approx(1)
    assert set(document["per_class"]) == {"nut", "bolt"}
    assert set(document["per_class"]["nut"]["segm"]) == {"AP", "AP50"}


def test_half_of_the_objects_and_boxes_only(command: Callable, annotations: Path, tmp_path: Path) -> None:
    predictions, out = tmp_path / "results.json", tmp_path / "eval.json"
    # both nuts and bolts: the nut is found, one of two bolts is
    predictions.write_text(json.dumps(perfect(annotations, "bbox")[:2]))
    ran = command("eval", "--predictions", predictions, "--annotations", annotations, "--out", out)
    assert ran.code == 0, ran.err
    document = json.loads(out.read_text())
    assert "segm" not in document and "segm" not in document["per_class"]["nut"]
    assert document["per_class"]["nut"]["bbox"]["AP"] == pytest.approx(1)
    # precision is 1 up to recall 0.5: 51 of the 101 recalls
    assert document["per_class"]["bolt"]["bbox"]["AP"] == pytest.approx(51 / 101)


def test_a_model_and_huddled(command: Callable, annotations: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    arguments = (
        "--annotations",
        annotations,
        "--huddled",
        "--max-detections",
        7,
        "--out",
        out,
        "--device",
        "cpu",
    )
    ran = command("eval", "--model", checkpoint, *arguments)
    assert ran.code == 0, ran.err
    assert "at most 5 detections" in ran.err and "3 of 3 pictures" in ran.err
    document = json.loads(out.read_text())
    assert document["max_detections"] == 7
    assert 0 <= document["segm"]["AP"] <= 1
    assert len(document["huddled"]) == 1 + 6 * 6 and document["huddled"][0]["images"] == 3


def test_mistakes_of_eval(command: Callable, annotations: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": 99, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1}]))
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    no_list = tmp_path / "object.json"
    no_list.write_text("{}")
    no_json = tmp_path / "broken.json"
    no_json.write_text("[{")
    truth = ("--annotations", annotations)
    for arguments, word in [
        (truth, "--predictions"),
        ((*truth, "--model", checkpoint, "--predictions", results), "either"),
        ((*truth, "--predictions", results, "--images", tmp_path), "--images"),
        ((*truth, "--predictions", results), "99"),
        ((*truth, "--predictions", no_list), "object.json"),
        ((*truth, "--predictions", no_json), "broken.json"),
        ((*truth, "--predictions", tmp_path / "none.json"), "none.json"),
        ((*truth, "--predictions", nothing, "--max-detections", 0), "max_detections"),
        (("--annotations", no_json, "--predictions", results), "broken.json"),
        (("--annotations", tmp_path / "none.json", "--predictions", results), "none.json"),
    ]:
        ran = command("eval", *arguments)
        assert ran.code == 2, (arguments, ran)
        assert ran.err.startswith("dsg: error: ") and ran.err.count("\n") == 1 and word in ran.err, ran.err
    ran = command("eval", *truth, "--model", checkpoint, "--images", tmp_path / "nowhere")
    assert ran.code == 2 and "nowhere" in ran.err.splitlines()[-1]


def test_data_check(command: Callable, annotations: Path) -> None:
    ran = command("data", "check", annotations)
    assert ran.code == 0, ran.err
    assert "3 images" in ran.out and "3 objects" in ran.out
    (annotations.parent / "images" / "2.png").unlink()
    ran = command("data", "check", annotations)
    assert ran.code == 2
    assert "2.png" in ran.out and "cannot be used" in ran.err.splitlines()[-1]
