"""`dsg bench precision`: the share of detections that are found again, by hand, and the rows beside `dsg eval`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from dsg.bench.precision import matched_share


def result(start: int, length: int = 20, score: float = 0.9, category: int = 1, image: int = 1) -> dict[str, Any]:
    """A detection whose mask is a run of pixels of a row of 100."""
    mask = np.zeros((1, 100), np.uint8, order="F")
    mask[0, start : start + length] = 1
    return {"image_id": image, "category_id": category, "score": score, "segmentation": coco_mask.encode(mask)}


@pytest.mark.parametrize(
    ("reference", "found", "share", "count"),
    [
        ([], [], 1.0, 0),
        ([], [result(0)], 1.0, 0),
        ([result(0)], [], 0.0, 1),
        ([result(0)], [result(0, score=0.01)], 1.0, 1),
        # 19 of 20 pixels are .95; 19 shared of 21 are not
        ([result(0)], [result(0, 19)], 1.0, 1),
        ([result(0)], [result(1)], 0.0, 1),
        ([result(0)], [result(0, category=2)], 0.0, 1),
        ([result(0)], [result(0, image=2)], 0.0, 1),
        ([result(0, score=0.3), result(50, score=0.31)], [result(50)], 1.0, 1),
        # one to one
        ([result(0), result(0)], [result(0)], 0.5, 2),
        ([result(0), result(0)], [result(0), result(0)], 1.0, 2),
        # The better one takes the closest and leaves the other one's; in the order given it would take it away.
        ([result(0, 40, 0.5), result(0, 41, 0.8)], [result(0, 41), result(0, 39)], 1.0, 2),
        # Greedy: the better one takes the only one that the other would match, though it has nothing better itself.
        ([result(0, 40, 0.8), result(0, 38, 0.5)], [result(0, 39)], 0.5, 2),
        ([result(0), result(30), result(60), result(0, image=2)], [result(60), result(0), result(31)], 0.5, 4),
    ],
)
def test_matched_share(reference: list, found: list, share: float, count: int) -> None:
    assert matched_share(reference, found) == (share, count)


def test_rows(
    command: Callable, annotations: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    evaluated = tmp_path / "eval.json"
    options = ("--model", checkpoint, "--annotations", annotations, "--device", "cpu")
    assert command("eval", *options, "--precision", "float32", "--out", evaluated).code == 0
    ap = {kind: 100 * json.loads(evaluated.read_text())[kind]["AP"] for kind in ("bbox", "segm")}

    out = tmp_path / "precision.json"
    ran = command("bench", "precision", *options, "--out", out)
    assert ran.code == 0, ran.err
    assert "3 of 3 pictures" in ran.err
    plain = json.loads(out.read_text())["rows"]  # float32 beside itself
    assert [row["unit"] for row in plain] == ["AP", "AP", "%"]
    assert [row["baseline"] for row in plain] == pytest.approx([ap["bbox"], ap["segm"], 100.0], abs=0.001)
    assert all(row["value"] == row["baseline"] and row["ratio"] == 1 for row in plain)
    assert all(row["case"].startswith("random, float32, 200 proposals, ") for row in plain)

    fewer = ("--precision", "bfloat16", "--proposals", 50, "--proposals", 4, "--add")
    assert command("bench", "precision", *options, *fewer, "--out", out).code == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows[:3] == plain
    which = [row["case"].partition(" proposals")[0] for row in rows[3:]]
    assert which == [f"random, bfloat16, {number}" for number in (200, 50, 4) for _ in range(3)]
    assert all("baseline float32, 200 proposals" in row["case"] for row in rows)
    assert all(0 <= row["value"] <= 100 for row in rows)


@pytest.mark.parametrize("own", [200, 301])
def test_more_than_300_mask_proposals_are_measured_at_300(
    command: Callable, annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int
) -> None:
    from dsg.model import build
    from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint

    monkeypatch.setenv("DSG_COMMIT", "abc123")
    model = tmp_path / "guided.safetensors"
    info = CheckpointInfo(
        name="guided",
        preset="dsg_lite0_fpn",
        overrides={"max_detections": 5, "proposals": own},
        categories=(Category(7, "nut"), Category(3, "bolt")),
        resize=Resize(64, 96),
        score_threshold=0.0,
        max_detections=5,
        licence="Apache-2.0",
    )
    save_checkpoint(model, build("dsg_lite0_fpn", 2, max_detections=5, proposals=own), info)
    out = tmp_path / "precision.json"
    options = ("--model", model, "--annotations", annotations, "--device", "cpu", "--out", out)
    assert command("bench", "precision", *options).code == 0
    cases = [row["case"] for row in json.loads(out.read_text())["rows"]]
    assert [case.split(", ")[2] for case in cases] == [f"{own} proposals"] * 3 + ["300 proposals"] * 3 * (own > 300)


def test_mistakes(command: Callable, annotations: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--annotations", annotations, "--device", "cpu", "--out", tmp_path / "x.json")
    for more, words in (
        (("--model", tmp_path / "gone.safetensors"), "gone.safetensors"),
        (("--model", checkpoint, "--precision", "int8"), "precision must be one of"),
        (("--model", checkpoint, "--proposals", 0), "--proposals"),
    ):
        ran = command("bench", "precision", *options, *more)
        assert ran.code == 2 and words in ran.err, ran.err
