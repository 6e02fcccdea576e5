"""The outline of a mask as COCO polygons, exact to the pixel.

Outlines run along the edges of pixels: corner (x, y) is the top left of the pixel in column x and row y, so a
single pixel at (0, 0) is [0, 0, 1, 0, 1, 1, 0, 1]. Pixels that touch at a corner alone belong to separate
polygons.

COCO has no holes. A hole runs the other way round than the polygon that it lies in, and is joined to it by a seam
that runs there and back: empty under the even-odd rule, which COCO's own rasteriser follows, and the non-zero one.

How it works: a rectilinear outline is known by its corners. Sorted along rows, the corners pair up into the
horizontal edges, first with second, third with fourth; sorted along columns, into the vertical ones. Walking
along a horizontal edge, then a vertical one, and so on, gives the outlines, with no walk over pixels.

Letters: `h, w` size of a window of the picture, `n` number of corners.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsg.ops.rle import rle_counts

Loop = NDArray[np.int64]  # [n, 2], (x, y) of a closed outline's corners


def mask_window(rle: dict[str, Any]) -> tuple[NDArray[np.bool_], int, int]:
    """The smallest window with all pixels of a mask, without decoding the rest of the picture.

    Returns:
        bool [h, w], and the window's first row and column; h = w = 0 for an empty mask.
    """
    height = rle["size"][0]
    counts = rle_counts(rle)
    ends = np.cumsum(counts)
    ones = counts[1::2] > 0
    if not ones.any():
        return np.zeros((0, 0), dtype=np.bool_), 0, 0
    starts, ends = (ends - counts)[1::2][ones], ends[1::2][ones]
    left = int(starts[0]) // height
    right = (int(ends[-1]) - 1) // height + 1
    steps = np.zeros((right - left) * height + 1, dtype=np.int8)
    steps[starts - left * height] = 1
    steps[ends - left * height] -= 1
    bits = np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_).reshape(right - left, height).T
    rows = np.flatnonzero(bits.any(axis=1))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return bits[top:bottom], top, left


def polygons(rle: dict[str, Any]) -> list[list[int]]:
    """COCO polygons of an RLE: flat lists x1, y1, x2, y2, ... in pixels; [] for an empty mask."""
    bits, top, left = mask_window(rle)
    outer, holes = outlines(bits)
    parts = [[loop] for loop in outer]
    for hole in holes:
        parts[_around(hole, outer)].append(hole)
    shift = np.array([left, top])
    return [(_join(loops) + shift).ravel().tolist() for loops in parts]


def outlines(bits: NDArray[np.bool_]) -> tuple[list[Loop], list[Loop]]:
    """Outlines of a mask bool [h, w]: those around pixels, and those around holes in them."""
    padded = np.pad(bits, 1).astype(np.int8)  # [h + 2, w + 2]
    # The four pixels around each corner of the grid, each [h + 1, w + 1].
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    turns = (above_left + above_right + below_left + below_right) % 2 == 1
    falling = (above_left & below_right & ~above_right & ~below_left) == 1  # two pixels that meet in this corner
    rising = (above_right & below_left & ~above_left & ~below_right) == 1
    # Where two pixels meet in a corner, two outlines do: it counts twice. `late_x` sorts the copy whose
    # horizontal edge leads right after the one whose edge leads left, `late_y` the copy whose vertical edge
    # leads down last.
    y, x = np.nonzero(turns | falling | rising)
    twice = (falling | rising)[y, x]
    falls = falling[y, x]
    y, x, falls = (np.concatenate([one, one[twice]]) for one in (y, x, falls))  # [n]
    late_x = np.zeros(len(y), dtype=np.bool_)
    late_x[len(twice) :] = True
    late_y = late_x == falls  # falling: left goes with up and right with down; rising: the other way round
    along_row = _partners(np.lexsort((late_x, x, y)))
    along_column = _partners(np.lexsort((late_y, y, x)))

    outer: list[Loop] = []
    holes: list[Loop] = []
    visited = [False] * len(y)
    for start in np.lexsort((late_x, x, y)).tolist():
        if visited[start]:
            continue
        loop = []
        corner = start
        while not visited[corner]:
            other = along_row[corner]
            visited[corner] = visited[other] = True
            loop += [corner, other]
            corner = along_column[other]
        # The first corner of a loop is its top left one: below and right of it is a pixel, or the hole.
        is_outer = bool(below_right[y[start], x[start]])
        points = np.stack([x[loop], y[loop]], axis=1)
        if is_outer:
            outer.append(points)
        else:
            # The other way round, from the same corner.
            holes.append(np.roll(points[::-1], 1, axis=0))
    return outer, holes


def _partners(order: NDArray[np.int64]) -> list[int]:
    """Corner -> the corner at the other end of its edge, when neighbours in `order` [n] pair up."""
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner.tolist()


def _around(hole: Loop, outer: list[Loop]) -> int:
    """Index of the outline that a hole lies in: of those around it, the one with the smallest area."""
    x, y = hole[0] + (
        0.5,
        -0.5,
    )  # the pixel just above the hole's top left corner belongs to what is around it
    around = [index for index, loop in enumerate(outer) if _contains(loop, x, y)]
    return min(around, key=lambda index: _area(outer[index]))


def _contains(loop: Loop, x: float, y: float) -> bool:
    following = np.roll(loop, -1, axis=0)
    crossed = (loop[:, 0] == following[:, 0]) & (loop[:, 0] < x) & ((loop[:, 1] < y) != (following[:, 1] < y))
    return bool(crossed.sum() % 2)


def _area(loop: Loop) -> float:
    following = np.roll(loop, -1, axis=0)
    return abs(float((loop[:, 0] * following[:, 1] - following[:, 0] * loop[:, 1]).sum())) / 2


def _join(loops: list[Loop]) -> Loop:
    """One outline through an outer loop and its holes, with seams from the outer loop's first corner."""
    outer, *holes = loops
    pieces = [outer]
    for hole in holes:
        pieces += [outer[:1], hole, hole[:1]]
    return np.concatenate(pieces)
