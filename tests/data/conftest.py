"""Small COCO sets, written where a test asks for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MakeCoco = Callable[..., Path]

THREE = [
    {"id": 7, "name": "nut"},
    {"id": 2, "name": "fig", "supercategory": "fruit"},
    {"id": 90, "name": "date"},
]


@pytest.fixture
def make_coco(tmp_path: Path) -> MakeCoco:
    """make_coco(sizes, annotations, ...) writes `NAME/instances.json` with pictures of noise; gives its path.

    Image i of `sizes` [(height, width), ...] has id i + 1; annotations get ids from 1 on and what they lack.
    """

    def make(
        sizes: list[tuple[int, int]],
        annotations: list[dict[str, Any]] | None = None,
        categories: list[dict[str, Any]] | None = None,
        name: str = "set",
        **more: Any,
    ) -> Path:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        rng = np.random.default_rng(0)
        images = []
        for index, (height, width) in enumerate(sizes):
            file_name = f"{index}.png"
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / file_name)
            images.append({"id": index + 1, "file_name": file_name, "height": height, "width": width})
        objects = [
            {"id": index + 1, "image_id": 1, "category_id": 7, "iscrowd": 0, **one}
            for index, one in enumerate(annotations or [])
        ]
        document = {
            "images": images,
            "annotations": objects,
            "categories": THREE if categories is None else categories,
            **more,
        }
        path = folder / "instances.json"
        path.write_text(json.dumps(document))
        return path

    return make


def square(x: float, y: float, side: float) -> list[float]:
    """A polygon's coordinates."""
    return [x, y, x + side, y, x + side, y + side, x, y + side]


@pytest.fixture(name="square")
def _square() -> Callable[[float, float, float], list[float]]:
    return square
