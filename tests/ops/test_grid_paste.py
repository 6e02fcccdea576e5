"""Masks pasted at pixel centres: against one grid over the whole picture, and pycocotools."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional

from dsg.ops import encode_masks, paste_masks
from dsg.ops.array_masks import encode_arrays, paste_arrays


def pasted_whole(probs, boxes, size):
    """Every pixel of the picture in the frame of each box."""
    height, width = size
    y = torch.arange(height, dtype=probs.dtype) + 0.5
    x = torch.arange(width, dtype=probs.dtype) + 0.5
    down = (y[None] - boxes[:, 1:2]) / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1  # [N, H]
    across = (x[None] - boxes[:, 0:1]) / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1  # [N, W]
    grid = torch.stack([across[:, None].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width)], dim=-1)
    return functional.grid_sample(probs[:, None], grid, align_corners=False)[:, 0]


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_against_the_whole_picture(threshold):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(20, 28, 28, generator=generator, dtype=torch.float64)
    corners = torch.rand(20, 2, generator=generator, dtype=torch.float64) * 90 - 15
    boxes = torch.cat([corners, corners + 1 + 60 * torch.rand(20, 2, generator=generator)], dim=1)
    whole = pasted_whole(probs, boxes, (70, 83)) >= threshold
    found = paste_masks(probs, boxes, (70, 83), threshold, paste="grid")
    assert torch.equal(found, whole) and whole.any()
    for rle, mask in zip(encode_masks(probs, boxes, (70, 83), threshold, paste="grid"), whole, strict=True):
        expected = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert rle["counts"].encode() == expected["counts"]


def test_by_hand_and_what_cannot_be_seen():
    probs = torch.ones(4, 2, 2)
    boxes = torch.tensor([[1.0, 1, 3, 3], [10, 10, 12, 12], [2, 2, 2, 3], [0, 0, float("nan"), 1]])
    masks = paste_masks(probs, boxes, (4, 4), paste="grid")
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1:3] = True
    assert torch.equal(masks[0], expected) and not masks[1:].any()
    with pytest.raises(ValueError, match="'box' or 'grid'"):
        paste_masks(probs, boxes, (4, 4), paste="round")


def test_arrays_give_the_same_without_torch():
    generator = np.random.default_rng(0)
    probs = generator.random((20, 28, 28), dtype=np.float64)
    corners = generator.random((20, 2)) * 90 - 15
    boxes = np.concatenate([corners, corners + 1 + 60 * generator.random((20, 2))], axis=1)
    wanted = paste_masks(torch.from_numpy(probs), torch.from_numpy(boxes), (70, 83), paste="grid")
    assert np.array_equal(paste_arrays(probs, boxes, (70, 83), paste="grid"), wanted.numpy())
    assert encode_arrays(probs, boxes, (70, 83), paste="grid") == encode_masks(
        torch.from_numpy(probs), torch.from_numpy(boxes), (70, 83), paste="grid"
    )
