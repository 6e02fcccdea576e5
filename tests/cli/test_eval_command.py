"""`dsg eval` and `dsg data check` on a small COCO file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsg.model.network.checkpoint import read_info

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


def test_thresholds_are_set_in_the_file(
    command: Callable, annotations: Path, checkpoint: Path, photo: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copy(checkpoint, tmp_path / "mine.safetensors"))
    before = read_info(model)
    ran = command("eval", "--model", model, "--annotations", annotations, "--set-thresholds", 0.75, "--device", "cpu")
    assert ran.code == 0, ran.err
    after = read_info(model)
    assert f"{model}: lowest score that is shown by default: {after.threshold_in_words}" in ran.out
    assert len(after.class_thresholds) == 2 and after.class_precision == 0.75
    assert replace(after, class_thresholds=(), class_precision=0.0, score_threshold=before.score_threshold) == before

    # A network of random weights finds no object: the thresholds lie at the best score seen, up to what the size of a
    # batch changes in the last digits.
    out = tmp_path / "out"
    pictures = sorted((annotations.parent / "images").iterdir())
    assert command("predict", *pictures, "--model", model, "--out", out, "--score-threshold", 0).code == 0
    found = json.loads((out / "predictions.json").read_text())
    assert len(found) == 15
    best_of_all = max(one["score"] for one in found)
    assert [*after.class_thresholds, after.score_threshold] == pytest.approx([best_of_all] * 3, abs=1e-5)

    results = tmp_path / "results.json"
    results.write_text("[]")
    original = model.read_bytes()
    truth = ("--annotations", annotations)
    for arguments, word in [
        ((*truth, "--predictions", results, "--set-thresholds", 0.5), "goes with --model"),
        ((*truth, "--model", "dsg_lite0_coco", "--set-thresholds", 0.5), "copy its file"),
        ((*truth, "--model", model, "--set-thresholds", 0), "above 0 and at most 1, not 0.0"),
        ((*truth, "--model", model, "--set-thresholds", 1.5), "above 0 and at most 1, not 1.5"),
        ((*truth, "--model", model, "--set-thresholds", "much"), "--set-thresholds"),
        ((*truth, "--model", tmp_path / "gone.safetensors", "--set-thresholds", 0.5), "gone.safetensors"),
        ((*truth, "--model", photo, "--set-thresholds", 0.5), "photo.png"),
    ]:
        ran = command("eval", *arguments)
        assert ran.code == 2, (arguments, ran)
        assert ran.err.startswith("dsg: error: ") and ran.err.count("\n") == 1 and word in ran.err, ran.err
    assert model.read_bytes() == original


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
