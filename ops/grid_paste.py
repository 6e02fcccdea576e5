"""Masks pasted at pixel centres, the convention of detectron2 and mmdetection: no border, no rounding of boxes.

A pixel whose centre lies at (u, v) of its box, from 0 to 1, takes the mask's value at (u * m - 0.5, v * m - 0.5),
bilinear, zeros around the mask.

Letters: `N` masks, `m` side of a mask, `h, w` size of the part of a box that lies in the picture.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dsg.ops.grid_windows import grid_spans
from dsg.ops.windows import Window

_BLOCK_PIXELS = 1 << 20  # a window is sampled in blocks of rows of about this many pixels


def grid_windows(
    probs: Tensor,  # [N, m, m]
    boxes: Tensor,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float,
) -> Iterator[tuple[Window, Tensor]]:
    """Each mask that shows in the picture: its window, and the window's bits, bool [h, w].

    Args:
        probs: float32 or float64; boxes: xyxy pixels, may reach outside the picture.
    """
    for window, (x1, y1, x2, y2) in grid_spans(boxes.detach().cpu().double().tolist(), probs.shape[-1], image_size):
        across = _normalised(range(window.left, window.right), x1, x2, probs)  # [w]
        parts = []
        step = max(1, _BLOCK_PIXELS // len(across))
        for begin in range(window.top, window.bottom, step):
            down = _normalised(range(begin, min(begin + step, window.bottom)), y1, y2, probs)  # [h of the block]
            grid = torch.stack(
                [across.expand(len(down), -1), down[:, None].expand(-1, len(across))], dim=-1
            )  # [h, w, 2], (x, y) in -1..1
            sampled = F.grid_sample(
                probs[window.number][None, None],
                grid[None],
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            )
            parts.append(sampled[0, 0] >= threshold)
        yield window, torch.cat(parts)


def _normalised(pixels: range, low: float, high: float, like: Tensor) -> Tensor:
    """Centres of pixels in the frame of a box, -1 to 1."""
    centres = torch.arange(pixels.start, pixels.stop, device=like.device).to(like.dtype) + 0.5
    return (centres - low) / (high - low) * 2 - 1
