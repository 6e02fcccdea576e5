"""`dsg bench`: the file of results, and what the cases compare."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsg.bench import ops, report
from dsg.bench.report import Row, time_row
from dsg.export.contract import ExportError


def test_file_of_results(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    monkeypatch.setattr(ops, "run", lambda device, repeats, on_case: [time_row("a; baseline b", 2.0, 5.0)])
    out = tmp_path / "deep" / "quick.json"
    ran = command("bench", "ops", "--out", out, "--device", "cpu")
    assert ran.code == 0, ran.err
    document = json.loads(out.read_text())
    assert set(document) == {"name", "commit", "date", "device", "torch", "rows"}
    assert (document["name"], document["commit"], document["torch"]) == ("quick", "abc123", torch.__version__)
    assert document["rows"] == [{"case": "a; baseline b", "value": 2.0, "unit": "ms", "baseline": 5.0, "ratio": 2.5}]


def test_no_commit_is_said_before_measuring(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(report.subprocess, "run", no_git)
    ran = command("bench", "ops", "--out", tmp_path / "x.json", "--device", "cpu")
    assert ran.code == 2 and "DSG_COMMIT" in ran.err and not (tmp_path / "x.json").exists()


def test_both_sides_of_a_case_pool_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without guidance the two sides are the same function, so they are the same work."""
    pooled: list[torch.Tensor] = []
    monkeypatch.setattr(ops, "_IMAGE", (128, 160))
    monkeypatch.setattr(ops, "_POOLINGS", (ops._Pooling("small head", 20, 4, 7),))
    monkeypatch.setattr(ops, "_finish", lambda levels, result: pooled.append(result.detach()))
    cases = list(ops._pooling_cases(torch.device("cpu")))
    assert [case.partition(",")[0] for case, _, _ in cases] == ["RoIAlign", "SgRoIAlign"] * 2
    _, ours, theirs = cases[0]
    ours()
    theirs()
    torch.testing.assert_close(pooled[0], pooled[1], rtol=1e-5, atol=1e-5)


def test_run_gives_a_row_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_IMAGE", (64, 64))
    monkeypatch.setattr(ops, "_PHOTO", (48, 64))
    monkeypatch.setattr(ops, "_POOLINGS", (ops._Pooling("small head", 5, 4, 7),))
    told: list[str] = []
    rows = ops.run(torch.device("cpu"), repeats=1, on_case=told.append)
    assert [row.case for row in rows] == told and len(rows) == 6
    assert all(isinstance(row, Row) and row.value > 0 and row.baseline > 0 for row in rows)
    assert all(row.spread == (row.value, row.value) and row.peak_mib is None for row in rows)


def test_unknown_formats_are_named(command: Callable, tmp_path: Path) -> None:
    ran = command("bench", "model", "--formats", "eager,tensorrt", "--out", tmp_path / "x.json")
    assert ran.code == 2 and "unknown format tensorrt; known are eager, compiled, torchscript" in ran.err


def test_a_file_that_differs_is_left_out_and_the_others_are_measured(
    command: Callable, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> Path:
        raise ExportError("the onnx file differs from the model and was not kept")

    monkeypatch.setenv("DSG_COMMIT", "abc123")
    monkeypatch.setattr("dsg.bench.formats.export", refuse)
    options = ("--formats", "onnx", "--batch", 1, "--repeats", 1, "--device", "cpu", "--out", tmp_path / "x.json")
    ran = command("bench", "model", "--model", checkpoint, *options)
    assert ran.code == 0 and "left out: onnx: the onnx file differs" in ran.err
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert row["case"].split(", ")[1] == "eager"
    assert row["spread"] == row["baseline_spread"] == pytest.approx([row["value"]] * 2, abs=0.01)


@pytest.mark.slow
def test_formats_side_by_side(
    command: Callable, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    out = tmp_path / "formats.json"
    options = (
        "--formats",
        "eager,torchscript,onnx-body",
        "--no-proof",  # weights as random as these have no order to compare
        "--batch",
        1,
        "--batch",
        2,
        "--repeats",
        1,
        "--device",
        "cpu",
    )
    ran = command("bench", "model", "--model", checkpoint, "--out", out, *options)
    assert ran.code == 0, ran.err
    rows = json.loads(out.read_text())["rows"]
    ways = [row["case"].split(", ")[1] for row in rows]
    assert ways == ["eager", "torchscript", "onnx-body"] * 2
    assert all("float32, files not proven; baseline eager" in row["case"] for row in rows)
    assert all(row["value"] > 0 and row["baseline"] == rows[index // 3 * 3]["value"] for index, row in enumerate(rows))
