"""Where the boxes of masks show in a picture, by torchvision's pasting convention (see `masks.py`). Needs no torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Corners are held within this: further than any picture reaches, exact in float32, and far from int64's end.
_FURTHEST = float(1 << 40)


class Window(NamedTuple):
    """Where one box shows in the picture; rows and columns are half open."""

    number: int
    top: int
    bottom: int
    left: int
    right: int
    box_top: int
    box_left: int
    box_height: int
    box_width: int


def box_windows(
    boxes: NDArray[np.floating[Any]],  # [N, 4] xyxy, float32 or float64
    side: int,
    image_size: tuple[int, int],
) -> Iterator[Window]:
    """Integer boxes grown for the border and cut by the picture, without those that miss it.

    Args:
        boxes: as (x1, y1, x2, y2) in pixels of the picture.
        side: m of the masks in them.
        image_size: (H, W) of the picture.
    """
    height, width = image_size
    with np.errstate(invalid="ignore", over="ignore"):  # boxes that are not finite are left out below
        half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)  # [N, 2]
        centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
        grown = np.concatenate((centre - half, centre + half), axis=1)  # [N, 4]
    finite = np.all(np.isfinite(grown), axis=1).tolist()  # [N]
    corners = np.nan_to_num(grown).clip(-_FURTHEST, _FURTHEST).astype(np.int64).tolist()
    for index, (x1, y1, x2, y2) in enumerate(corners):
        top, bottom = max(y1, 0), min(y2 + 1, height)
        left, right = max(x1, 0), min(x2 + 1, width)
        if finite[index] and top < bottom and left < right:
            yield Window(index, top, bottom, left, right, y1, x1, y2 - y1 + 1, x2 - x1 + 1)
