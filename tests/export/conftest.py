"""A checkpoint that finds something in every picture, and its exports, each made once."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dsg.export.contract import Format
from dsg.export.writing import export
from dsg.model import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint


class Exported(NamedTuple):
    """A file that `export` wrote, and what it said meanwhile."""

    path: Path
    said: list[str]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters', about their own parts
        yield


def save_random(path: Path, preset: str, **overrides: object) -> Path:
    """A checkpoint of random weights, some larger than training starts with, so that scores and masks spread."""
    torch.manual_seed(0)
    overrides = {"proposals": 60, "rpn_candidates": 100, "max_detections": 30, **overrides}
    model = build(preset, 3, **overrides)
    layers = (model.box_head.classifier, 0.03), (model.mask_head.predictor, 0.3), (model.rpn_head.objectness, 0.05)
    for layer, std in layers:
        torch.nn.init.normal_(layer.weight, std=std)
    info = CheckpointInfo(
        name=path.stem,
        preset=preset,
        overrides=overrides,
        categories=(Category(7, "nut"), Category(3, "bolt", "metal"), Category(12, "Unterlegscheibe ø")),
        resize=Resize(128, 192),
        score_threshold=0.2,
        max_detections=30,
        licence="Apache-2.0",
    )
    save_checkpoint(path, model, info)
    return path


@pytest.fixture
def make_checkpoint() -> Callable[..., Path]:
    return save_random


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("weights") / "random.safetensors", "dsg_lite0_fpn")


def _exported(checkpoint: Path, kind: Format, folder: Path) -> Exported:
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Exported(export(checkpoint, kind, folder, device="cpu", say=said.append), said)


@pytest.fixture(scope="session")
def onnx_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(checkpoint, Format.ONNX, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def torchscript_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(checkpoint, Format.TORCHSCRIPT, tmp_path_factory.mktemp("torchscript"))


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """uint8 [H, W, 3] each, of several sizes: blotches."""
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (5, 6, 3), dtype=np.uint8) for _ in range(4)]
    sizes = [(150, 120), (90, 200), (128, 128), (101, 77)]
    return [
        np.array(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC))
        for one, (height, width) in zip(coarse, sizes, strict=True)
    ]
