"""`dsg bench systems`: two systems from pictures to a results file, and going on without repeating what is done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsg.bench.systems import SYSTEMS, chosen


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
    out, runs = tmp_path / "systems.json", tmp_path / "runs"
    arguments = ["bench", "systems", "--data", annotations, "--val", annotations, "--out", out, "--runs", runs]
    arguments += ["--system", "PANet", "--side-by-side", 2, "--device", "cpu", *options]
    ran = command(*arguments)
    assert ran.code == 0, (runs / "panet.log").read_text()
    document = json.loads(out.read_text())
    cases = [row["case"] for row in document["rows"]]
    assert len(cases) == 4
    assert cases[2:] == ["PANet, box AP; baseline Mask R-CNN", "PANet, mask AP; baseline Mask R-CNN"]
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    assert "PANet: finished before" in command(*arguments).err
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2


def test_a_run_that_fails_is_named(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "0123456789")
    ran = command("bench", "systems", "--data", tmp_path / "none.json", "--out", tmp_path / "o.json",
                  "--runs", tmp_path / "runs", "--system", "Mask R-CNN")  # fmt: skip
    assert ran.code == 2 and "not finished: Mask R-CNN" in ran.err and not (tmp_path / "o.json").exists()
