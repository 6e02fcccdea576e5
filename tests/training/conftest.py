"""A detector of a few hundred numbers, pictures for it, and a recipe: for tests of the loop around the
network."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from dsg.model.network.detections import Detections
from dsg.model.training.config import (
    BatchConfig,
    EmaConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    ValidationConfig,
)


class TinyDetector(nn.Module):
    """Two losses that are means over images, one with noise as samplers have; no detections."""

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, images, targets=None):
        pooled = torch.stack([self.backbone(image[None]).mean(dim=(2, 3))[0] for image in images])  # [B, 4]
        out = self.head(pooled)  # [B, 2]
        if not self.training:
            return [
                Detections(
                    boxes=torch.zeros(0, 4),
                    scores=torch.zeros(0),
                    labels=torch.zeros(0, dtype=torch.int64),
                    mask_probs=torch.zeros(0, 28, 28),
                    image_size=tuple(image.shape[-2:]),
                )
                for image in images
            ]
        wanted = torch.stack([target["boxes"].mean() for target in targets]) / 10
        noise = self.noise * torch.randn(len(images), device=out.device)
        return {"loss_a": (out[:, 0] - wanted + noise).square().mean(), "loss_b": out[:, 1].square().mean()}


def make_batch(number: int, images: int = 4):
    """The batch of micro-step `number`: the same whenever it is asked for."""
    rng = torch.Generator().manual_seed(1000 + number)
    pictures = [torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=rng) for _ in range(images)]
    targets = [{"boxes": 10 * torch.rand(2, 4, generator=rng), "image_id": i} for i in range(images)]
    return pictures, targets


def make_batches(start: int = 0, images: int = 4):
    """Batches without end, from `start` on."""
    while True:
        yield make_batch(start, images)
        start += 1


@pytest.fixture
def tiny_detector():
    """The class, so that a test may build it more than once."""
    return TinyDetector


@pytest.fixture
def batches():
    return make_batches


@pytest.fixture
def tiny_recipe():
    """Six steps of four images, everything that has a state switched on."""

    def make(**changes) -> Recipe:
        recipe = Recipe(
            optimizer=OptimizerConfig(lr=0.05, clip_norm=1.0),
            schedule=ScheduleConfig(iterations=6, steps=(4,), warmup_iterations=2),
            batch=BatchConfig(images=4, workers=0),
            ema=EmaConfig(decay=0.9),
            validation=ValidationConfig(),
            run=RunConfig(log_every=2, save_every=100),
        )
        return dataclasses.replace(recipe, **changes)

    return make


def draw_shapes(folder, pictures: int, size: int = 128, seed: int = 0, licences=()):
    """A COCO file with discs (category id 7) and bars (category id 3) in plain colours on noise; returns its
    path."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "disc"}, {"id": 3, "name": "bar"}],
        "licenses": [{"id": n, "name": name} for n, name in enumerate(licences, start=1)],
    }
    for number in range(1, pictures + 1):
        image = Image.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        for place, (category, colour) in enumerate([(7, (230, 40, 40)), (3, (40, 80, 240))]):
            x = int(rng.integers(4, size // 4)) + place * size // 2
            y = int(rng.integers(4, size // 3))
            w, h = (size // 3, size // 3) if category == 7 else (size // 4, size // 2)
            if category == 7:
                draw.ellipse((x, y, x + w, y + h), fill=colour)
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                points = np.stack([x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)], 1)
            else:
                draw.rectangle((x, y, x + w, y + h), fill=colour)
                points = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [points.ravel().tolist()],
                }
            )
        image.save(folder / "images" / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "width": size, "height": size}
        if licences:
            entry["license"] = 1 + number % len(licences)
        document["images"].append(entry)
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def shapes():
    return draw_shapes
