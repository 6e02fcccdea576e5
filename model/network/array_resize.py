"""The resize of `image_tensor.resize` by NumPy alone, for what runs without torch.

8-bit pictures come out equal to PyTorch's CPU kernel to the last bit: it works in whole numbers, with weights of at
most 16 bits, first along rows and then along columns, and rounds to 8 bits in between. Pillow's differ by up to 2.

H, W size of a picture, h, w after the resize, n its size along one axis, k the taps of one output pixel.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsg.model.network.info import Resize
from dsg.model.network.sizes import resized_size

_MOST_PRECISION = 22  # bits of a weight after the point, at most
_WEIGHT_LIMIT = 1 << 15  # weights are 16-bit numbers


def resize_array(pixels: NDArray[Any], how: Resize) -> NDArray[Any]:
    """Scale a picture, keeping its shape.

    Args:
        pixels: [H, W, 3], uint8 or float32 in 0..1.

    Returns:
        [h, w, 3]: uint8 when that came in and the resize has a low-pass, else float32 in 0..1.
    """
    height, width = resized_size(pixels.shape[0], pixels.shape[1], how)
    if pixels.dtype == np.uint8 and not how.antialias:
        pixels = pixels.astype(np.float32) / np.float32(255)
    for axis, size in ((1, width), (0, height)):
        if pixels.shape[axis] != size:
            first, weights = _taps(pixels.shape[axis], size, how.antialias)
            resample = _resample_bytes if pixels.dtype == np.uint8 else _resample_floats
            pixels = resample(pixels, first, weights, axis)
    return np.ascontiguousarray(pixels)


def _taps(before: int, after: int, antialias: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each output pixel its first source pixel [n], and the weights of the source pixels from there on [n, k]."""
    scale = before / after
    width = max(scale, 1.0) if antialias else 1.0  # half the base of the triangle that weighs, in source pixels
    if antialias:
        centre = scale * (np.arange(after) + 0.5)  # [n]
        first = np.maximum((centre - width + 0.5).astype(np.int64), 0)
        last = np.minimum((centre + width + 0.5).astype(np.int64), before)
        place = first[:, None] + np.arange((last - first).max()) - centre[:, None] + 0.5  # [n, k]
        weights = np.maximum(1.0 - np.abs(place / width), 0.0)
        weights[first[:, None] + np.arange(weights.shape[1]) >= last[:, None]] = 0.0
        return first, weights / weights.sum(axis=1, keepdims=True)
    place = np.maximum(scale * (np.arange(after) + 0.5) - 0.5, 0.0)  # [n]
    first = np.minimum(place.astype(np.int64), before - 1)
    fraction = np.where(first + 1 < before, place - first, 0.0)
    return first, np.stack([1.0 - fraction, fraction], axis=1)


def _resample_bytes(
    pixels: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.float64], axis: int
) -> NDArray[np.uint8]:
    precision = 0
    while precision < _MOST_PRECISION and int(0.5 + weights.max() * (1 << (precision + 1))) < _WEIGHT_LIMIT:
        precision += 1
    whole = (weights * (1 << precision) + 0.5).astype(np.int32)  # [n, k]; no weight is negative
    sums = _weighted_sum(pixels, first, whole, axis, np.int32)
    sums += 1 << (precision - 1)
    return (sums >> precision).clip(0, 255).astype(np.uint8)


def _resample_floats(
    pixels: NDArray[np.floating[Any]], first: NDArray[np.int64], weights: NDArray[np.float64], axis: int
) -> NDArray[np.float32]:
    return _weighted_sum(pixels, first, weights.astype(np.float32), axis, np.float32)


def _weighted_sum(
    pixels: NDArray[Any], first: NDArray[np.int64], weights: NDArray[Any], axis: int, dtype: type
) -> NDArray[Any]:
    """Sum over k of weights[:, k] * pixels[first + k], along an axis."""
    along = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total: NDArray[Any] = np.zeros((), dtype=dtype)
    for tap in range(weights.shape[1]):
        # where a tap lies beyond the picture its weight is 0
        index = np.minimum(first + tap, pixels.shape[axis] - 1)
        total = total + pixels.take(index, axis=axis).astype(dtype) * weights[:, tap].reshape(along)
    return total
