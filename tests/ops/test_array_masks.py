"""Masks without torch against those with it."""

import numpy as np
import pytest
import torch

from dsg.ops import encode_masks, paste_masks
from dsg.ops.array_masks import encode_arrays, paste_arrays
from dsg.ops.rle import decode_rle

SIZE = (240, 320)


def instances(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps in boxes of all sizes, some partly outside the picture."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(-40, 280, (count, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(0, 200, (count, 2))], axis=1).astype(np.float32)
    coarse = torch.from_numpy(generator.uniform(0, 1, (count, 1, 5, 5)))
    probs = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)[:, 0]
    return probs.numpy().astype(np.float32), boxes


@pytest.mark.parametrize("side", [14, 28])
def test_masks_and_rles_are_those_of_torch(side: int) -> None:
    probs, boxes = instances(80, side, seed=side)
    wanted = paste_masks(torch.from_numpy(probs), torch.from_numpy(boxes), SIZE).numpy()
    found = paste_arrays(probs, boxes, SIZE)
    assert wanted.any() and (found != wanted).sum() <= wanted.size / 100_000
    rles = encode_arrays(probs, boxes, SIZE)
    assert all(np.array_equal(decode_rle(rle), mask) for rle, mask in zip(rles, found, strict=True))
    same = sum(
        a == b for a, b in zip(rles, encode_masks(torch.from_numpy(probs), torch.from_numpy(boxes), SIZE), strict=True)
    )
    assert same >= len(rles) - 1


def test_boxes_that_show_nothing_give_empty_masks() -> None:
    boxes = np.array([[np.nan, 0, 5, 5], [0, 0, np.inf, 5], [-50, -50, -20, -20]], dtype=np.float32)
    probs = np.ones((3, 14, 14), dtype=np.float32)
    assert not paste_arrays(probs, boxes, SIZE).any()
    assert encode_arrays(probs, boxes, SIZE) == encode_masks(torch.from_numpy(probs), torch.from_numpy(boxes), SIZE)
    assert encode_arrays(probs[:0], boxes[:0], SIZE) == []


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"probs must be \[N, m, m\]"):
        paste_arrays(np.ones((1, 3, 4), dtype=np.float32), np.zeros((1, 4), dtype=np.float32), SIZE)
    with pytest.raises(ValueError, match=r"boxes must be \[2, 4\]"):
        paste_arrays(np.ones((2, 3, 3), dtype=np.float32), np.zeros((1, 4), dtype=np.float32), SIZE)
