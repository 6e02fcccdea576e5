"""The batches that a written file is tried on. B images of a batch, H and W their size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsg.export.padded import stack_arrays
from dsg.model.network.array_resize import resize_array
from dsg.model.network.info import CheckpointInfo
from dsg.model.network.pixels import picture_array

_SHADES = 5  # of a made-up picture's coarse pattern, each way
_PICTURES_OF_USER = 20
_MORE_SIZES = ((128, 160), (100, 150), (96, 96), (120, 128), (64, 160))
_MORE_SEEDS = (3, 4)


@dataclass(frozen=True)
class Case:
    """One batch, as a file takes it."""

    name: str
    images: NDArray[np.float32]  # [B, 3, H, W] in 0..1
    sizes: NDArray[np.int64]  # [B, 2] (height, width)


def made_up_cases(half: bool = False) -> list[Case]:
    """Batches of sizes that the graph was not recorded with, sides that are no multiples of 32, small pictures, and
    empty ones, in which nothing can be found, alone and beside others.

    Args:
        half: more of them. In half precision about one detection of a hundred is another one, in the model itself as in
            its file, though not the same one in both: how many they lose can be compared where there are many.
    """
    mixed = _pictures([(160, 224), (224, 96), (150, 220), (64, 64), (224, 224)], seed=0)
    images, sizes = stack_arrays(mixed)
    with_empty = sizes[:3].copy()
    with_empty[1] = 0
    (odd,) = _pictures([(203, 301)], seed=1)
    (small,) = _pictures([(40, 50)], seed=2)
    more = [
        Case("5 pictures more", *stack_arrays(_pictures(_MORE_SIZES, seed))) for seed in (_MORE_SEEDS if half else ())
    ]
    return [
        Case("1 picture of 203 x 301", odd[None], np.array([[203, 301]])),
        Case("1 picture of 40 x 50", small[None], np.array([[40, 50]])),
        Case("5 pictures of several sizes", images, sizes),
        Case("3 pictures, one of them empty", images[:3], with_empty),
        Case("2 pictures without anything to find", np.zeros((2, 3, 96, 96), np.float32), np.zeros((2, 2), np.int64)),
        *more,
    ]


def cases_of_pictures(paths: Sequence[Path], info: CheckpointInfo) -> list[Case]:
    """The user's own pictures, resized as the model wants them: each alone, and five together."""
    pictures = [resize_array(picture_array(path), info.resize).transpose(2, 0, 1) for path in paths[:_PICTURES_OF_USER]]
    alone = [Case(path.name, *stack_arrays([picture])) for path, picture in zip(paths, pictures, strict=False)]
    together = [
        Case(f"pictures {5 * number + 1} to {5 * number + len(group)} together", *stack_arrays(group))
        for number, group in enumerate(pictures[begin : begin + 5] for begin in range(0, len(pictures), 5))
    ]
    return alone + together


def _pictures(sizes: Sequence[tuple[int, int]], seed: int) -> list[NDArray[np.float32]]:
    """[3, H, W] each in 0..1: soft blotches with discs and boxes on them, something for any detector to look at."""
    generator = np.random.default_rng(seed)
    return [_picture(height, width, generator) for height, width in sizes]


def _picture(height: int, width: int, generator: np.random.Generator) -> NDArray[np.float32]:
    shades = generator.integers(0, 256, (_SHADES, _SHADES, 3), dtype=np.uint8)
    canvas: NDArray[Any] = np.asarray(Image.fromarray(shades).resize((width, height), Image.Resampling.BICUBIC)).copy()
    rows, columns = np.mgrid[:height, :width]
    for number in range(6):
        y, x = generator.uniform(0, height), generator.uniform(0, width)
        radius = generator.uniform(0.05, 0.3) * min(height, width)
        apart = np.maximum(abs(rows - y), abs(columns - x)) if number % 2 else np.hypot(rows - y, columns - x)
        canvas[apart < radius] = generator.integers(0, 256, 3)
    noise = generator.normal(0, 6, canvas.shape)
    return ((canvas + noise).clip(0, 255) / 255).astype(np.float32).transpose(2, 0, 1)
