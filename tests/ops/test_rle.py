"""COCO RLE against pycocotools and against counts written by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from dsg.ops.rle import (
    counts_to_string,
    counts_to_strings,
    decode_rle,
    encode_rle,
    rle_areas,
    rle_counts,
    string_to_counts,
    strings_to_counts,
    window_counts,
)

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))


def oracle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def blobs(height, width, seed, size):
    """A mask of long runs: random squares of about `size` pixels."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=np.bool_)
    for _ in range(5):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + size, x : x + size] ^= True
    return mask


@settings(deadline=None, max_examples=300)
@given(masks)
def test_masks_encode_as_pycocotools_does_and_come_back(mask):
    rle = encode_rle(mask)
    assert rle == oracle(mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)
    assert rle_areas([rle]) == [mask.sum()] == [coco_mask.area(rle)]


@pytest.mark.parametrize("size", [1, 7, 60, 500, 4000])
def test_long_runs_encode_as_pycocotools_does(size):
    # Runs of millions of pixels need numbers of several groups, of either sign.
    mask = blobs(1200, 1500, seed=size, size=size)
    rle = encode_rle(mask)
    assert rle == oracle(mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize("value", [False, True])
def test_uniform_masks(value):
    mask = np.full((3, 5), value)
    assert encode_rle(mask) == oracle(mask)
    assert string_to_counts(encode_rle(mask)["counts"]).tolist() == ([0, 15] if value else [15])


def test_counts_by_hand():
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=np.bool_)  # columns: 0 0 | 1 1 | 1 0
    rle = encode_rle(mask)
    assert rle_counts(rle).tolist() == [2, 3, 1]
    assert rle == {"size": [2, 3], "counts": "231"}  # one group each: the number itself after '0'
    assert rle_counts({"size": [2, 3], "counts": [2, 3, 1]}).tolist() == [2, 3, 1]
    assert rle_counts({"size": [2, 3], "counts": b"231"}).tolist() == [2, 3, 1]


def test_numbers_around_the_edges_of_a_group():
    # 5 bits with sign hold -16..15; 16 needs two groups: 0b10000 with 'more' set, then 0.
    assert counts_to_string([15]) == "?"
    assert counts_to_string([16]) == "`0"
    # The fourth count is a difference to the second: 1 - 17 = -16 is one group, 0b10000. 1 - 18 = -17 is two,
    # 0b01111 with 'more' set and 0b11111.
    assert counts_to_string([0, 17, 0, 1]) == "0a00@"
    assert counts_to_string([0, 18, 0, 1]) == "0b00_O"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2**40), max_size=9), max_size=6))
def test_strings_of_many_lists_equal_those_of_each_and_come_back(lists):
    strings = counts_to_strings([np.array(one, dtype=np.int64) for one in lists])
    assert strings == [counts_to_string(one) for one in lists]
    assert [string_to_counts(text).tolist() for text in strings] == lists
    assert [counts.tolist() for counts in strings_to_counts(strings)] == lists


@settings(deadline=None, max_examples=300)
@given(masks, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_window_counts_equal_those_of_the_whole_picture(window, top, left, below, right):
    whole = np.pad(window, ((top, below), (left, right)))
    counts = window_counts(window, top, left, whole.shape)
    assert counts_to_string(counts) == oracle(whole)["counts"]


def test_an_empty_window_is_an_empty_mask():
    assert window_counts(np.zeros((0, 0), dtype=np.bool_), 0, 0, (4, 5)).tolist() == [20]


def test_a_window_must_lie_in_the_picture():
    with pytest.raises(ValueError, match="does not lie in a picture of 4x5"):
        window_counts(np.ones((3, 3), dtype=np.bool_), 2, 0, (4, 5))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("23", "add up to 5"),
        ("2p1", "outside '0' to 'o'"),
        ("2 1", "outside '0' to 'o'"),
        ("23Q", "middle of a number"),
        ("P" * 13 + "0", "more than 12 groups"),
        ("é", "outside ASCII"),
        ([7, -1], "a negative number"),
    ],
)
def test_broken_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        decode_rle({"size": [2, 3], "counts": counts})


@pytest.mark.parametrize("rle", [{"counts": "6"}, {"size": [2, 3]}, {"size": [6], "counts": "6"}, [[0, 0, 1, 1, 2, 0]]])
def test_what_is_no_rle_is_refused(rle):
    with pytest.raises(ValueError, match="an RLE is"):
        decode_rle(rle)


def test_a_mask_has_two_dimensions():
    with pytest.raises(ValueError, match=r"shape \[1, 2, 3\]"):
        encode_rle(np.zeros((1, 2, 3), dtype=np.bool_))
