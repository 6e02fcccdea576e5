"""`dsg bench detector`: its stages are the whole, and both sides of it are the same network below the heads."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dsg.bench.detector import Torchvision, made_up_scene, torchvision_on_backbone_of
from dsg.model.network.predictor import load

CPU = torch.device("cpu")
STAGES = ["to run lengths", "prepare", "detect", "run lengths"]


def test_stages_of_torchvision_are_its_forward(checkpoint: Path) -> None:
    predictor = load(checkpoint, CPU)
    chance = np.random.default_rng(0)
    pictures = [chance.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((96, 128), (128, 100))]
    theirs = Torchvision(torchvision_on_backbone_of(predictor, 5), CPU, pictures[0])
    found = theirs.detect(theirs.prepare(pictures))
    masks = theirs.finish(*found)
    again = theirs.finish(*found)
    with torch.inference_mode():
        wanted = theirs.model([torch.from_numpy(one).permute(2, 0, 1) / 255 for one in pictures])
    for own, repeated, one, picture in zip(masks, again, wanted, pictures, strict=True):
        assert own.shape == (5, 1, *picture.shape[:2])
        assert torch.equal(own, one["masks"] >= 0.5) and torch.equal(own, repeated)


def test_torchvision_is_on_the_same_backbone(checkpoint: Path) -> None:
    predictor = load(checkpoint, CPU)
    ours = predictor.model.backbone
    weights = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    theirs = torchvision_on_backbone_of(predictor, 5)
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        named = theirs.backbone(images)
        assert list(named) == ["0", "1", "2", "3", "pool"]
        for own, other in zip(ours(images), named.values(), strict=True):
            torch.testing.assert_close(own, other)
    theirs.backbone.levels.double()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())
    resize = predictor.info.resize
    assert (theirs.transform.min_size, theirs.transform.max_size) == ((resize.short_side,), resize.long_side)


def test_cpu_case(command: Callable, checkpoint: Path, photo: Path, tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    out = tmp_path / "detector_cpu.json"
    options = ("--model", checkpoint, "--picture", photo, "--repeats", 2, "--device", "cpu")
    ran = command("bench", "detector", "--out", out, *options)
    assert ran.code == 0, ran.err
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for row, stage in zip(rows, STAGES, strict=True):
        assert row["case"].startswith("random, 5 detections, batch 1 of 120x150") and stage in row["case"]
        assert "Mask R-CNN on the same backbone, 5 detections" in row["case"].partition("; baseline ")[2]
        assert row["unit"] == "ms" and row["spread"][0] <= row["value"] <= row["spread"][1]
        assert row["baseline_spread"][0] <= row["baseline"] <= row["baseline_spread"][1]
        assert "peak_mib" not in row


def test_what_belongs_to_a_gpu(command: Callable, tmp_path: Path) -> None:
    ran = command("bench", "detector", "--out", tmp_path / "x.json", "--device", "cpu", "--batch", 2)
    assert ran.code == 2 and "--batch is for a GPU" in ran.err


def test_scene_is_the_same_in_every_run() -> None:
    scene = made_up_scene()
    assert scene.shape == (480, 640, 3) and scene.dtype == np.uint8 and np.array_equal(scene, made_up_scene())
    assert len(np.unique(scene // 32)) == 8  # from dark to light


@pytest.mark.gpu
def test_gpu_case(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    out = tmp_path / "detector.json"
    ran = command("bench", "detector", "--out", out, "--batch", 1, "--batch", 2, "--repeats", 1, "--device", "cuda")
    assert ran.code == 0, ran.err
    rows = json.loads(out.read_text())["rows"]
    # 2 batches of 4 networks with 4 rows each, and DSG beside our own Mask R-CNN at 2 numbers of proposals
    assert len(rows) == 2 * (4 * 4 + 2)
    assert [row["unit"] for row in rows].count("images/s") == 4
    assert all(row["value"] > 0 and row["peak_mib"] >= 0 for row in rows)
