"""Outlines of masks, against hand-drawn ones and pycocotools' rasteriser."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from dsg.ops.rle import encode_rle
from dsg.service.polygons import mask_window, polygons


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


def drawn(parts: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *shape))).astype(bool)


def shoelace(part: list[int]) -> float:
    x, y = np.reshape(part, (-1, 2)).T
    return abs(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) / 2


def smooth(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """A blob: a sum of a few broad bumps, cut at a level."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    field = np.zeros(shape)
    for _ in range(6):
        cy, cx = rng.uniform(0.2, 0.8, 2) * shape
        field += rng.choice([1, 1, -1]) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * rng.uniform(4, 15) ** 2))
    return field > 0.4


def test_one_pixel_is_a_square() -> None:
    (part,) = polygons(encode_rle(mask_of("...", "..#")))
    assert sorted(zip(part[0::2], part[1::2], strict=True)) == [(2, 1), (2, 2), (3, 1), (3, 2)]


def test_an_l_has_six_corners() -> None:
    (part,) = polygons(encode_rle(mask_of("#..", "#..", "###")))
    assert len(part) == 12
    assert shoelace(part) == 5


def test_pixels_that_touch_at_a_corner_are_apart() -> None:
    for rows in (("#.", ".#"), (".#", "#.")):
        parts = polygons(encode_rle(mask_of(*rows)))
        assert [shoelace(part) for part in parts] == [1, 1]


def test_a_ring_keeps_its_hole_and_what_lies_in_it() -> None:
    mask = mask_of("#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######")
    parts = polygons(encode_rle(mask))
    assert sorted(map(shoelace, parts)) == [8, 24]
    np.testing.assert_array_equal(drawn(parts, mask.shape), mask)


def test_an_empty_mask_has_none_and_a_full_one_has_one() -> None:
    assert polygons(encode_rle(np.zeros((4, 5), bool))) == []
    (part,) = polygons(encode_rle(np.ones((4, 5), bool)))
    assert shoelace(part) == 20 and len(part) == 8


@pytest.mark.parametrize("seed", range(12))
def test_blobs_are_redrawn_as_they_were(seed: int) -> None:
    mask = smooth(seed, (90, 120))
    assert mask.any()
    parts = polygons(encode_rle(mask))
    again = drawn(parts, mask.shape)
    assert (again & mask).sum() / (again | mask).sum() > 0.99


@settings(deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_mask_has_outlines_of_its_area(mask: np.ndarray) -> None:
    parts = polygons(encode_rle(mask))
    assert sum(map(shoelace, parts)) == mask.sum()
    for part in parts:
        points = np.reshape(part, (-1, 2))
        steps = points - np.roll(points, 1, axis=0)
        assert len(points) >= 4 and (points >= 0).all() and (points <= mask.shape[::-1]).all()
        assert steps.any(axis=1).sum() >= 4
    if parts:
        # Crossing number of each pixel's centre over all outlines: odd inside. A loop over edges that nobody can doubt.
        inside = np.zeros(mask.shape, int)
        for part in parts:
            points = np.reshape(part, (-1, 2))
            for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0), strict=True):
                for row in range(mask.shape[0]):
                    if (ya <= row) != (yb <= row):
                        crossing = xa + (row + 0.5 - ya) * (xb - xa) / (yb - ya)
                        inside[row, : max(0, int(np.ceil(crossing - 0.5)))] += 1
        np.testing.assert_array_equal(inside % 2 == 1, mask)


@settings(deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_the_window_holds_all_and_no_more(mask: np.ndarray) -> None:
    bits, top, left = mask_window(encode_rle(mask))
    again = np.zeros_like(mask)
    again[top : top + bits.shape[0], left : left + bits.shape[1]] = bits
    np.testing.assert_array_equal(again, mask)
    if mask.any():
        assert bits[0].any() and bits[-1].any() and bits[:, 0].any() and bits[:, -1].any()
