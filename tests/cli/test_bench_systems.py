"""`dsg bench systems`: two systems from pictures to a results file, and going on without repeating what is done."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from dsg.bench.pictures import _panel
from dsg.bench.systems import SYSTEMS, chosen, compare, planned
from dsg.model.data.records import ImageRecord


def test_systems_come_with_what_they_are_compared_with() -> None:
    assert [one.name for one in chosen(["DSC"])] == ["HTC", "DSC"]
    assert chosen([]) == list(SYSTEMS)
    with pytest.raises(ValueError, match="unknown system 'YOLO'; known are Mask R-CNN, DSG"):
        chosen(["YOLO"])


def test_two_small_runs(command: Callable, annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "0123456789")
    small = ["schedule.iterations=1", "schedule.warmup_iterations=0", "batch.images=2", "batch.workers=0",
             "augment.crop_size=64", "predict.short_side=64", "predict.long_side=96", "overrides.channels=8",
             "overrides.box_head_width=16", "overrides.roi_samples=8"]  # fmt: skip
    options = [part for setting in small for part in ("--set", setting)]
    out, runs, sheet = tmp_path / "systems.json", tmp_path / "runs", tmp_path / "sheet.png"
    arguments = ["bench", "systems", "--data", annotations, "--val", annotations, "--out", out, "--runs", runs]
    arguments += ["--system", "PANet", "--side-by-side", 2, "--device", "cpu", "--pictures", sheet, *options]
    ran = command(*arguments)
    assert ran.code == 0, (ran.err, (runs / "panet_seed0.log").read_text())
    document = json.loads(out.read_text())
    cases = [row["case"] for row in document["rows"]]
    assert len(cases) == 4
    assert cases[2:] == [
        f"systems_organoids: PANet, {kind} AP, seed 0; baseline Mask R-CNN" for kind in ("box", "mask")
    ]
    pictures = json.loads(annotations.read_text())["images"]
    with Image.open(sheet) as drawn:
        assert drawn.width > 3 * 100 and drawn.height > min(4, len(pictures)) * 100
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    assert "panet_seed0: finished before" in command(*arguments, "--add").err
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    assert json.loads(out.read_text())["rows"] == document["rows"]  # the same cases, not twice
    document["device"] = "another"
    out.write_text(json.dumps(document))
    ran = command(*arguments, "--add")
    assert ran.code == 2 and "was measured with device another" in ran.err


def test_rows_of_several_seeds(tmp_path: Path) -> None:
    scores = {("Mask R-CNN", 0): (0.50, 0.40), ("DSG", 0): (0.55, 0.38), ("Mask R-CNN", 3): (0.40, 0.30),
              ("DSG", 3): (0.47, 0.36)}  # fmt: skip
    plan = planned(chosen(["DSG"]), [0, 3], tmp_path)
    assert [run.folder.name for run in plan] == ["mask_r-cnn_seed0", "dsg_seed0", "mask_r-cnn_seed3", "dsg_seed3"]
    for run in plan:
        run.folder.mkdir()
        box, mask = scores[run.system.name, run.seed]
        line = {"kind": "validation", "bbox/AP": box, "segm/AP": mask}
        (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    rows = {row.case: (row.value, row.baseline, row.ratio) for row in compare(plan, "nuts")}
    assert len(rows) == 12
    assert rows["nuts: DSG, box AP, seed 3; baseline Mask R-CNN"] == (47.0, 40.0, 1.175)
    assert rows["nuts: DSG, mask AP, mean of 2 seeds; baseline Mask R-CNN"] == (37.0, 35.0, 1.057)


def test_panels_show_each_mask_and_its_edge() -> None:
    record = ImageRecord(id=1, path=Path("a.png"), height=10, width=20, annotations=())
    mask = np.zeros((10, 20), np.uint8, order="F")
    mask[2:8, 3:12] = 1
    entry = {"image_id": 1, "segmentation": coco_mask.encode(mask)}
    panel = np.array(_panel([entry], record, "one"))[18:]  # [160, 320, 3]: 16 times as large, below the title
    assert (panel[5 * 16 + 8, 7 * 16 + 8] >= 70).all() and not panel[5 * 16 + 8, 15 * 16 + 8].any()
    assert (panel[2 * 16 + 8, 7 * 16 + 8] < 20).all()  # the edge is drawn


def test_a_run_that_fails_is_named(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "0123456789")
    ran = command("bench", "systems", "--data", tmp_path / "none.json", "--out", tmp_path / "o.json",
                  "--runs", tmp_path / "runs", "--system", "Mask R-CNN")  # fmt: skip
    assert ran.code == 2 and "not finished: mask_r-cnn_seed0" in ran.err and not (tmp_path / "o.json").exists()
