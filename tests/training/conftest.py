"""A detector of a few hundred numbers, pictures for it, and a recipe: for tests of the loop around the
network."""

import dataclasses

import pytest
import torch
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
