"""Masks predicted inside boxes, pasted or encoded by NumPy alone, for what runs without torch.

The convention is that of `masks.py`, and so are the results, but for pixels whose probability lies within the last
bit of the threshold.

Letters: `N` masks, `m` side of a mask, `s = m + 2` side with its border, `H, W` size of the picture, `h, w` size of a
window (what of a box lies in the picture).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsg.ops.grid_windows import grid_spans, sample_array
from dsg.ops.rle import counts_to_strings, window_counts
from dsg.ops.windows import Window, box_windows

Floats = NDArray[np.floating[Any]]
# Windows are computed in blocks of rows of about this many pixels, to bound the temporaries.
_BLOCK_PIXELS = 1 << 18


def paste_arrays(
    probs: Floats,  # [N, m, m]
    boxes: Floats,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float = 0.5,
    paste: str = "box",
) -> NDArray[np.bool_]:  # [N, H, W]
    """`dsg.ops.paste_masks` for arrays: full-size masks, bool [N, H, W]."""
    masks = np.zeros((len(probs), *image_size), dtype=np.bool_)
    for window, bits in _pasted_windows(probs, boxes, image_size, threshold, paste):
        masks[window.number, window.top : window.bottom, window.left : window.right] = bits
    return masks


def encode_arrays(
    probs: Floats,  # [N, m, m]
    boxes: Floats,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float = 0.5,
    paste: str = "box",
) -> list[dict[str, Any]]:
    """`dsg.ops.encode_masks` for arrays: N COCO RLEs, made without a full-size mask."""
    nothing = window_counts(np.zeros((0, 0), dtype=np.bool_), 0, 0, image_size)
    counts = [nothing] * len(probs)
    for window, bits in _pasted_windows(probs, boxes, image_size, threshold, paste):
        counts[window.number] = window_counts(bits, window.top, window.left, image_size)
    height, width = image_size
    return [{"size": [int(height), int(width)], "counts": text} for text in counts_to_strings(counts)]


def _pasted_windows(
    probs: Floats, boxes: Floats, image_size: tuple[int, int], threshold: float, paste: str
) -> Iterator[tuple[Window, NDArray[np.bool_]]]:
    """Each mask that shows in the picture: its window, and the window's bits [h, w]."""
    if probs.ndim != 3 or probs.shape[1] != probs.shape[2] or probs.shape[1] == 0:
        raise ValueError(f"probs must be [N, m, m], they are {list(probs.shape)}")
    if boxes.shape != (len(probs), 4):
        raise ValueError(f"boxes must be [{len(probs)}, 4], one for each mask, they are {list(boxes.shape)}")
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width), both at least 1, it is {tuple(image_size)}")
    if paste == "grid":
        for window, box in grid_spans(boxes.tolist(), probs.shape[-1], image_size):
            yield window, sample_array(probs[window.number], window, box) >= threshold
        return
    if paste != "box":
        raise ValueError(f"paste must be 'box' or 'grid', it is {paste!r}")
    padded = np.pad(probs.astype(np.float32, copy=False), ((0, 0), (1, 1), (1, 1)))  # [N, s, s]
    for window in box_windows(boxes, probs.shape[-1], image_size):
        yield window, _window_bits(padded[window.number], window, threshold)


def _window_bits(mask: Floats, window: Window, threshold: float) -> NDArray[np.bool_]:  # [s, s] -> [h, w]
    """Bits of a window of the mask resized to its box, in blocks of rows."""
    h, w = window.bottom - window.top, window.right - window.left
    left, top = window.left - window.box_left, window.top - window.box_top
    before, after, weight_before, weight_after = _neighbours(len(mask), window.box_width, left, left + w)  # [w] each
    across = _multiply_add(mask[:, before], weight_before, mask[:, after] * weight_after)  # [s, w]
    bits = np.empty((h, w), dtype=np.bool_)
    step = max(1, _BLOCK_PIXELS // w)
    for begin in range(0, h, step):
        end = min(begin + step, h)
        above, below, weight_above, weight_below = _neighbours(len(mask), window.box_height, top + begin, top + end)
        values = _multiply_add(across[above], weight_above[:, None], across[below] * weight_below[:, None])
        bits[begin:end] = values >= threshold
    return bits


def _neighbours(
    side: int, size: int, begin: int, end: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """For each of the pixels begin..end of one axis: its two source pixels, and the weight of each, float32."""
    scale = np.float32(side) / np.float32(size)
    middle = np.arange(begin, end).astype(np.float32) + np.float32(0.5)
    source = np.maximum(_multiply_add(middle, scale, np.float32(-0.5)), np.float32(0))
    first = np.minimum(source.astype(np.int64), side - 1)
    weight = np.minimum(source - first.astype(np.float32), np.float32(1))
    return first, np.minimum(first + 1, side - 1), np.float32(1) - weight, weight


def _multiply_add(factor: Floats, other: Any, addend: Any) -> Floats:
    """factor * other + addend in float32, rounded once as a processor's fused multiply-add does it."""
    # A product of two float32 is exact in float64.
    exact = factor.astype(np.float64) * np.asarray(other, dtype=np.float64) + np.asarray(addend, dtype=np.float64)
    return exact.astype(np.float32)
