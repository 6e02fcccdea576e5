"""`dsg train`: what reaches the training room, and one real run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsg.model.network.checkpoint import read_info


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of runs that were asked for; none really starts."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr("dsg.model.training.run.train", lambda *args, **kwargs: seen.append((args, kwargs)))
    return seen


def test_options_arrive(command: Callable, started: list, tmp_path: Path) -> None:
    ran = command(
        *(
            "train",
            "--config",
            "fast",
            "--data",
            "a.json",
            "--images",
            "a",
            "--data",
            "b.json",
            "--images",
            "b",
        ),
        *("--val", "v.json", "--val-images", "v", "--init", "x.safetensors", "--out", tmp_path, "--resume"),
        *("--set", "optimizer.lr=0.5", "--set", "batch.images=2", "--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    ((recipe, data, images), named) = started[0]
    assert (recipe.name, recipe.optimizer.lr, recipe.batch.images) == ("fast", 0.5, 2)
    assert (data, images) == ([Path("a.json"), Path("b.json")], [Path("a"), Path("b")])
    assert named == {
        "out": tmp_path,
        "val": [Path("v.json")],
        "val_images": [Path("v")],
        "init": "x.safetensors",
        "resume": True,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--config", "fats", "--data", "a.json"), "fast"),
        (("--config", "fast", "--data", "a.json", "--set", "optimizer.rate=1"), "rate"),
        (("--config", "fast", "--data", "a.json", "--set", "optimizer.lr=quick"), "optimizer.lr"),
        (("--config", "fast"), "--data"),
        (("--data", "a.json"), "--config"),
    ],
)
def test_mistakes(command: Callable, started: list, tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    ran = command("train", *arguments, "--out", tmp_path)
    assert ran.code == 2 and not started
    assert ran.err.startswith("dsg: error: ") and ran.err.count("\n") == 1 and word in ran.err, ran.err


@pytest.mark.slow
def test_train_then_predict(command: Callable, annotations: Path, photo: Path, tmp_path: Path) -> None:
    """Two steps on the CPU give a checkpoint with the file's category ids, which `dsg predict` takes."""
    out = tmp_path / "run"
    small = (
        "augment.short_sides=[96]",
        "augment.short_side_range=false",
        "predict.short_side=96",
        "batch.images=2",
    )
    short = ("schedule.iterations=2", "schedule.warmup_iterations=0", "validation.every=0", "batch.workers=0")
    changes = [word for setting in (*small, *short) for word in ("--set", setting)]
    data = ("--data", annotations, "--val", annotations)
    ran = command("train", "--config", "fast", *data, *changes, "--out", out, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert read_info(out / "best.safetensors").category_ids == [7, 3]
    assert {"best.safetensors", "last", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    ran = command("predict", photo, "--model", out / "best.safetensors", "--out", tmp_path / "seen")
    assert ran.code == 0, ran.err


def test_what_cannot_be_exported_is_said_before_training(command: Callable, started: list, tmp_path: Path) -> None:
    recipe = tmp_path / "adaptive.toml"
    recipe.write_text('model = "dsg_lite0_fpn"\n[overrides]\nroi_sampling_ratio = 0\n[schedule]\niterations = 10\n')
    ran = command("train", "--config", recipe, "--data", "a.json", "--out", tmp_path)
    assert ran.code == 0 and "note: this network will have no onnx export: " in ran.err, ran.err
    ran = command("train", "--config", "fast", "--data", "a.json", "--out", tmp_path)
    assert ran.code == 0 and ran.err == ""
    assert len(started) == 2
