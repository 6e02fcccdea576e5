"""COCO segmentations as pixels. H, W: size of the picture; h, w: of a patch; k: points."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from dsg.ops.rle import string_to_counts

_FAR = 1e6
"""Pixels: a polygon that reaches further is a mistake, and drawing it takes memory by its length."""
_LONGEST_RUN = 2**40
"""Pixels: far above any picture, far below what overflows a sum."""


@dataclass(frozen=True, slots=True)
class Patch:
    """The part of a mask that matters: small objects need no work on the pixels of the whole picture."""

    pixels: np.ndarray
    """uint8 [h, w], 0 and 1."""
    top: int
    """Row of the picture that the patch starts in."""
    left: int
    """Column of the picture that the patch starts in."""

    def box(self) -> tuple[float, float, float, float] | None:
        """The smallest box xyxy around the mask's pixels, half open, in the picture's pixels; None without
        any."""
        rows = np.flatnonzero(self.pixels.any(axis=1))
        columns = np.flatnonzero(self.pixels.any(axis=0))
        if not len(rows):
            return None
        x1, y1 = self.left + columns[0], self.top + rows[0]
        return float(x1), float(y1), float(self.left + columns[-1] + 1), float(self.top + rows[-1] + 1)

    def write(
        self,
        mask: np.ndarray,  # uint8 [H, W]
    ) -> None:
        """Puts the patch in its place of a whole mask."""
        h, w = self.pixels.shape
        mask[self.top : self.top + h, self.left : self.left + w] = self.pixels


def decode_mask(
    segmentation: list[list[float]] | dict[str, Any],
    height: int,
    width: int,
) -> np.ndarray:
    """Polygons, uncompressed RLE or compressed RLE as a mask, uint8 [H, W] of 0 and 1; equal to pycocotools.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...] in pixels, drawn as one mask; or
            {"size": [height, width], "counts": ...}, counts being a list of run lengths, a str or bytes.
        height, width: of the picture, pixels.

    Raises:
        ValueError: a polygon with an odd number of coordinates, fewer than 3 points or a number that is not finite;
            an RLE of another size, or whose runs do not fill the picture.
    """
    if isinstance(segmentation, dict):
        mask = np.zeros((height, width), np.uint8)
        draw_runs(rle_runs(segmentation, height, width), height).write(mask)
        return mask
    polygons = [polygon_points(polygon) for polygon in segmentation]
    if any(len(points) < 3 for points in polygons):
        raise ValueError("a polygon has fewer than 3 points")
    return draw_polygons(polygons, height, width)


def draw_polygons(
    polygons: Sequence[np.ndarray],  # float64 [k, 2] each, k >= 3
    height: int,
    width: int,
) -> np.ndarray:
    """The union of polygons, uint8 [H, W]; what lies outside the picture is cut off."""
    if not polygons:
        return np.zeros((height, width), np.uint8)
    rles = coco_mask.frPyObjects([points.ravel().tolist() for points in polygons], height, width)
    return np.ascontiguousarray(coco_mask.decode(coco_mask.merge(rles) if len(rles) > 1 else rles[0]))


def polygon_points(polygon: Any) -> np.ndarray:
    """A polygon's points, float64 [k, 2].

    Raises:
        ValueError: not a list of numbers below a million, or an odd number of them.
    """
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is {type(polygon).__name__}, not a list of coordinates")
    try:
        values = np.frombuffer(array("d", polygon), np.float64) if polygon else np.zeros(0)
    except (TypeError, OverflowError):
        raise ValueError("a polygon holds something that is not a number, or too large a one") from None
    if len(values) % 2:
        raise ValueError(f"a polygon has an odd number of coordinates ({len(values)})")
    if not (np.abs(values) < _FAR).all():
        raise ValueError("a polygon has a coordinate that is not finite or far too large")
    return values.reshape(-1, 2)


def has_area(
    points: np.ndarray,  # float64 [k, 2]
) -> bool:
    """Whether a polygon encloses anything: at least 3 points, not all on one line."""
    if len(points) < 3:
        return False
    # Nearly always the first triangle settles it, and plain numbers are quicker than arrays of three.
    (x1, y1), (x2, y2), (x3, y3) = points[:3].tolist()
    if (x2 - x1) * (y3 - y1) != (x3 - x1) * (y2 - y1):
        return True
    # Triangles from the first point, each by itself: loops of a polygon that crosses itself do not cancel.
    x, y = (points[1:] - points[:1]).T
    return bool(np.any(x[:-1] * y[1:] != x[1:] * y[:-1]))


def rle_runs(rle: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Lengths of an RLE's runs of 0, 1, 0, ... down the columns: int64 [runs], their sum is H * W.

    Raises:
        ValueError: no size or counts, another size, characters that no RLE has, negative runs, a wrong sum.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"RLE size is {size!r}, the picture's is {[height, width]} (height, width)")
    if isinstance(counts, str | bytes):
        runs = string_to_counts(counts)
        if (np.abs(runs) >= _LONGEST_RUN).any():
            raise ValueError("RLE counts hold a run longer than any picture")
    elif isinstance(counts, list) and all(type(run) is int and abs(run) < _LONGEST_RUN for run in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError("RLE counts must be a text or a list of whole numbers")
    if (runs < 0).any():
        raise ValueError("RLE counts hold a negative run")
    if runs.sum() != height * width:
        raise ValueError(f"RLE runs cover {runs.sum()} pixels, the picture has {height * width}")
    return runs


def draw_runs(
    runs: np.ndarray,  # int64 [runs], as from rle_runs
    height: int,
) -> Patch:
    """The columns that an RLE's mask touches."""
    ends = np.cumsum(runs)
    ones = np.flatnonzero(runs[1::2]) * 2 + 1
    if not len(ones):
        return Patch(np.zeros((0, 0), np.uint8), 0, 0)
    first = int(ends[ones[0]] - runs[ones[0]]) // height
    stop = int(ends[ones[-1]] - 1) // height + 1
    # The same runs, counted from the first column's start to the last column's end.
    bounds = np.clip(np.concatenate([[0], ends]), first * height, stop * height)
    values = np.zeros(len(runs), np.uint8)
    values[1::2] = 1
    pixels = np.repeat(values, np.diff(bounds)).reshape(stop - first, height).T  # [w, H] -> [H, w]
    return Patch(pixels, 0, first)
