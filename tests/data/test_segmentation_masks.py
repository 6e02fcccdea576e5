"""Masks of segmentations, against pycocotools."""

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsg.model.data.masks import Patch, decode_mask, draw_runs, has_area, polygon_points, rle_runs

# Slow machines are no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 2**32 - 1)


def random_mask(size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [H, W]: noise of any density, or blocks."""
    rng = np.random.default_rng(seed)
    if seed % 3:
        return (rng.random(size) < rng.random()).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
    mask[y : y + 7, x : x + 9] = 1
    return mask


def column_runs(mask: np.ndarray) -> list[int]:
    """Run lengths by a plain loop."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@unhurried
@given(sizes, seeds)
def test_rle_of_all_kinds(size, seed):
    mask = random_mask(size, seed)
    compressed = pycocotools.mask.encode(np.asfortranarray(mask))
    for counts in (compressed["counts"], compressed["counts"].decode(), column_runs(mask)):
        rle = {"size": list(size), "counts": counts}
        np.testing.assert_array_equal(decode_mask(rle, *size), mask)
        assert rle_runs(rle, *size).tolist() == column_runs(mask)


@unhurried
@given(sizes, seeds)
def test_patch_of_runs_holds_all_pixels_and_no_empty_column_at_its_ends(size, seed):
    mask = random_mask(size, seed)
    patch = draw_runs(np.array(column_runs(mask)), size[0])
    whole = np.zeros(size, np.uint8)
    patch.write(whole)
    np.testing.assert_array_equal(whole, mask)
    if mask.any():
        assert patch.pixels[:, 0].any() and patch.pixels[:, -1].any()
        x, y, w, h = pycocotools.mask.toBbox(pycocotools.mask.encode(np.asfortranarray(mask)))
        assert patch.box() == (x, y, x + w, y + h)
    else:
        assert patch.box() is None


def test_long_runs_of_a_large_picture():
    mask = np.zeros((3000, 2500), np.uint8)
    mask[17:2900, 3:2400] = 1
    rle = pycocotools.mask.encode(np.asfortranarray(mask))
    np.testing.assert_array_equal(decode_mask(rle, 3000, 2500), mask)


coordinates = st.floats(-15, 60, allow_nan=False, width=32)
polygon = st.lists(coordinates, min_size=6, max_size=16).map(lambda c: c[: len(c) // 2 * 2])
polygons = st.lists(polygon, min_size=1, max_size=3)


@unhurried
@given(sizes, polygons)
def test_polygons_equal_pycocotools(size, drawn):
    height, width = size
    expected = pycocotools.mask.decode(pycocotools.mask.merge(pycocotools.mask.frPyObjects(drawn, height, width)))
    np.testing.assert_array_equal(decode_mask(drawn, height, width), expected)


def test_a_drawn_square_by_hand():
    mask = decode_mask([[2, 1, 5, 1, 5, 3, 2, 3]], 4, 6)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0] * 6, [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0] * 6]


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ([[1, 2, 3, 4]], "fewer than 3 points"),
        ([[1, 2, 3]], "odd number"),
        ([[1, 2, 3, 4, 5, float("inf")]], "not finite"),
        ({"size": [5, 4], "counts": [20]}, "RLE size"),
        ({"size": [4, 5], "counts": [21]}, "cover 21 pixels"),
    ],
)
def test_bad_segmentations(segmentation, told):
    with pytest.raises(ValueError, match=told):
        decode_mask(segmentation, 4, 5)


@unhurried
@given(sizes, seeds, st.data())
def test_no_damaged_text_gets_through_unnoticed(size, seed, data):
    """A changed text is refused, or still is the RLE of some mask of the right size."""
    counts = bytearray(pycocotools.mask.encode(np.asfortranarray(random_mask(size, seed)))["counts"])
    place = data.draw(st.integers(0, len(counts) - 1))
    counts[place] = data.draw(st.integers(0, 255))
    rle = {"size": list(size), "counts": bytes(counts)}
    try:
        mask = decode_mask(rle, *size)
    except ValueError:
        return
    assert mask.shape == size and mask.max(initial=0) <= 1


def test_area_and_points():
    assert not has_area(np.zeros((0, 2)))
    assert not has_area(np.array([[1.0, 1], [2, 2]]))
    assert not has_area(np.array([[1.0, 1], [2, 2], [3, 3], [1.5, 1.5]]))
    assert has_area(np.array([[1.0, 1], [2, 2], [3, 3.5]]))
    assert polygon_points([1, 2.5]).tolist() == [[1, 2.5]]


def test_patch_box_counts_from_its_place():
    assert Patch(np.array([[0, 0], [0, 1]], np.uint8), 10, 20).box() == (21, 11, 22, 12)
