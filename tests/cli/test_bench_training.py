"""`dsg bench train`: what both sides are trained on, that they train alike, and the rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsg.bench.training import made_up_batch, torchvision_mask_rcnn
from dsg.model import build

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(64, 64), (128, 160)])
def test_made_up_objects(size: tuple[int, int]) -> None:
    images, targets = made_up_batch(3, size, CPU)
    repeated, _ = made_up_batch(3, size, CPU)
    assert len(images) == len(targets) == 3
    for image, again, target in zip(images, repeated, targets, strict=True):
        assert image.shape == (3, *size) and image.dtype == torch.uint8 and torch.equal(image, again)
        boxes, masks, labels = target["boxes"], target["masks"], target["labels"]
        assert 7 <= len(boxes) <= 20 and masks.shape == (len(boxes), *size) and labels.shape == (len(boxes),)
        assert 1 <= labels.min() and labels.max() <= 80
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([size[1], size[0]])).all()
        for (x1, y1, x2, y2), mask in zip(boxes.tolist(), masks, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert y1 - 0.5 <= rows.min() and rows.max() <= y2 - 0.5  # pixels whose centres lie inside
            assert x1 - 0.5 <= columns.min() and columns.max() <= x2 - 0.5
            # the area of an ellipse, up to a pixel along its outline
            area, width, height = mask.sum().item(), x2 - x1, y2 - y1
            assert abs(area - torch.pi / 4 * width * height) <= width + height


def test_both_sides_train_the_same_stages() -> None:
    ours = build("mask_rcnn_r50_fpn", 80)
    theirs = torchvision_mask_rcnn((64, 96))

    def trained(body: nn.Module) -> dict[str, torch.Size]:
        return {name: one.shape for name, one in body.named_parameters() if one.requires_grad}

    assert trained(ours.backbone.body) == trained(theirs.backbone.body)
    assert not any(name.startswith(("conv1", "layer1")) for name in trained(theirs.backbone.body))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in theirs.modules())
    assert theirs.roi_heads.box_predictor.cls_score.out_features == 81
    batch, _ = theirs.transform([torch.zeros(3, 64, 96)])
    assert batch.image_sizes == [(64, 96)]


@pytest.fixture
def rows_of(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Rows that `dsg bench train` writes for batches of two."""
    monkeypatch.setenv("DSG_COMMIT", "abc123")

    def rows(*options: object) -> list[dict[str, Any]]:
        out = tmp_path / "train.json"
        ran = command("bench", "train", "--out", out, "--batch", 2, *options)
        assert ran.code == 0, ran.err
        found: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return found

    return rows


def test_rows(rows_of: Callable) -> None:
    whole, *stages = rows_of("--model", "mask_rcnn_lite0_fpn", "--size", "64x96", "--repeats", 1, "--device", "cpu")
    case = "training mask_rcnn_lite0_fpn, batch 2 of 64x96, float32"
    assert whole["case"] == f"{case}; baseline torchvision's Mask R-CNN R-50" and whole["unit"] == "images/s"
    assert [row["case"].removeprefix(f"{case}, ").partition(" ")[0] for row in stages] == [
        "forward",
        "backward,",
        "clipping,",
    ]
    for key in ("value", "baseline"):  # one repeat: the stages are the whole
        assert 2000 / sum(row[key] for row in stages) == pytest.approx(whole[key], abs=0.01)


def test_mistakes(command: Callable, tmp_path: Path) -> None:
    for options, words in (
        (("--size", "800"), "HEIGHTxWIDTH"),
        (("--size", "800x12"), "at least 64"),
        (("--size", "x800"), "HEIGHTxWIDTH"),
        (("--model", "yolo"), "unknown preset 'yolo'"),
    ):
        ran = command("bench", "train", "--out", tmp_path / "x.json", "--device", "cpu", *options)
        assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1, ran.err


@pytest.mark.gpu
def test_memory_rows(rows_of: Callable) -> None:
    rows = rows_of("--model", "dsg_r50_fpn", "--size", "256x320", "--repeats", 2, "--device", "cuda")
    assert [row["unit"] for row in rows] == ["images/s", "ms", "ms", "ms", "GiB"]
    # the same batch of two, measured twice
    assert rows[-1]["value"] == pytest.approx(rows[0]["peak_mib"] / 1024, rel=0.05)
    assert rows[-1]["baseline"] == pytest.approx(rows[0]["baseline_peak_mib"] / 1024, rel=0.05)
