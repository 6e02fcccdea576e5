"""The resize without torch against the one with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsg.model.network.array_resize import resize_array
from dsg.model.network.image_tensor import resize
from dsg.model.network.info import Resize


def both(pixels: np.ndarray, how: Resize) -> tuple[np.ndarray, np.ndarray]:
    wanted = resize(torch.from_numpy(pixels).permute(2, 0, 1), how).permute(1, 2, 0).numpy()
    return resize_array(pixels, how), wanted


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    short=st.integers(1, 120),
    more=st.integers(0, 100),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_torch(height: int, width: int, short: int, more: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found, wanted = both(pixels, Resize(short, short + more))
    assert found.dtype == np.uint8 and np.array_equal(found, wanted)


@pytest.mark.parametrize("size", [(480, 640), (101, 77), (1500, 1000), (90, 120), (320, 427)])
def test_bytes_of_photo_sizes(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found, wanted = both(pixels, Resize(320, 512))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(300, 200), (37, 61), (100, 100)])
def test_floats_differ_in_the_last_bits(size: tuple[int, int], antialias: bool) -> None:
    pixels = np.random.default_rng(0).random((*size, 3), dtype=np.float32)
    found, wanted = both(pixels, Resize(100, 120, antialias=antialias))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # there positions are float32 too


def test_without_low_pass_bytes_become_floats() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found, wanted = both(pixels, Resize(100, 200, antialias=False))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # there positions are float32 too
