"""Where masks that are sampled at pixel centres show in a picture, and their sampling by NumPy alone.

Letters: `m` side of a mask, `h, w` size of a window (what of a box lies in the picture).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsg.ops.windows import Window

Box = tuple[float, float, float, float]


def grid_spans(boxes: list[list[float]], side: int, image_size: tuple[int, int]) -> Iterator[tuple[Window, Box]]:
    """Each box that shows: its window, and its corners. Outside of the box a mask fades to zero over half a cell."""
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= x1 or y2 <= y1:
            continue
        top, bottom = _span(y1, y2, side, image_size[0])
        left, right = _span(x1, x2, side, image_size[1])
        if top < bottom and left < right:
            yield Window(number, top, bottom, left, right, top, left, bottom - top, right - left), (x1, y1, x2, y2)


def sample_array(mask: NDArray[np.floating[Any]], window: Window, box: Box) -> NDArray[np.floating[Any]]:
    """A mask [m, m] at the pixel centres of its window, bilinear, zeros around it: [h, w]."""
    x1, y1, x2, y2 = box
    down = _weights(window.top, window.bottom, y1, y2, len(mask))  # [h, m]
    across = _weights(window.left, window.right, x1, x2, len(mask))  # [w, m]
    values: NDArray[np.floating[Any]] = (down @ mask.astype(np.float64) @ across.T).astype(mask.dtype)
    return values


def _weights(first: int, last: int, low: float, high: float, side: int) -> NDArray[np.float64]:
    """How much each cell counts at each pixel's centre: [pixels, m]."""
    places = (np.arange(first, last) + 0.5 - low) / (high - low) * side - 0.5
    return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(side)))


def _span(low: float, high: float, side: int, size: int) -> tuple[int, int]:
    fade = (high - low) / (2 * side) + 1
    return min(max(math.floor(low - fade), 0), size), min(max(math.ceil(high + fade), 0), size)
