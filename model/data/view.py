"""The geometry of one sample: which part of a picture is seen, how large and which way round.

Frames: *source* = the picture's pixels, as its annotations count them; *resized* = source times a scale on
each axis; *window* = the part of resized that is kept; *sample* = window after flips and turns, padded right
and below.
Coordinates are half open, the centre of pixel 0 lies at 0.5, in every frame. n: boxes, k: points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsg.model.data.masks import Patch, draw_polygons

# ImageNet's mean colour: about zero once the network has normalised it, as the network's own padding is.
_PAD_COLOR = (124, 116, 104)
_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class View:
    """Resize, cut, swap, turn, pad; in this order. `View.whole(size)` changes nothing."""

    source: tuple[int, int]
    """(height, width) of the picture."""
    resized: tuple[int, int]
    """(height, width) that the whole picture is resized to; only the window is ever computed."""
    window: tuple[int, int, int, int]
    """(top, left, height, width) of what is kept, in resized pixels."""
    flip_x: bool = False
    """Left and right are swapped."""
    flip_y: bool = False
    """Top and bottom are swapped."""
    quarter_turns: int = 0
    """Turns by 90 degrees against the clock, after the flips; 0 to 3."""
    canvas: tuple[int, int] | None = None
    """(height, width) of the sample, at least the turned window's; None: the turned window's."""

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "View":
        """The view that shows a picture of `size` (height, width) as it is."""
        return cls(source=size, resized=size, window=(0, 0, *size))

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) of the turned window: the part of the sample that is not padding."""
        height, width = self.window[2:]
        return (width, height) if self.quarter_turns % 2 else (height, width)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the sample."""
        return self.canvas or self.shown

    def map_points(
        self,
        points: np.ndarray,  # float64 [k, 2], (x, y) in source pixels
    ) -> np.ndarray:
        """Points in sample pixels, float64 [k, 2]; those outside the window lie outside the sample."""
        top, left, height, width = self.window
        x = points[:, 0] * (self.resized[1] / self.source[1]) - left
        y = points[:, 1] * (self.resized[0] / self.source[0]) - top
        if self.flip_x:
            x = width - x
        if self.flip_y:
            y = height - y
        for _ in range(self.quarter_turns):
            # Against the clock: the right edge comes to lie on top.
            x, y = y, width - x
            height, width = width, height
        return np.stack([x, y], axis=1)

    def map_boxes(
        self,
        boxes: np.ndarray,  # float64 [n, 4] xyxy in source pixels
    ) -> np.ndarray:
        """Boxes in sample pixels, float64 [n, 4] xyxy, not clipped."""
        first, second = self.map_points(boxes[:, :2]), self.map_points(boxes[:, 2:])
        return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)

    def clip_boxes(
        self,
        boxes: np.ndarray,  # float64 [n, 4] xyxy in sample pixels
    ) -> np.ndarray:
        """Boxes cut to what is shown, float64 [n, 4]; empty ones have no width or height."""
        height, width = self.shown
        return np.clip(boxes, 0, [width, height, width, height])

    def map_patch(self, patch: Patch) -> Patch:
        """A mask in source pixels as one in sample pixels: each shown pixel takes the nearest source
        pixel's value."""
        top, left, height, width = self.window
        rows = self._nearest(top, height, self.source[0], self.resized[0]) - patch.top
        columns = self._nearest(left, width, self.source[1], self.resized[1]) - patch.left
        # Both rise, so what the patch covers is one run of each.
        y1, y2 = np.searchsorted(rows, [0, patch.pixels.shape[0]])
        x1, x2 = np.searchsorted(columns, [0, patch.pixels.shape[1]])
        pixels = patch.pixels[rows[y1:y2, None], columns[x1:x2]]
        if self.flip_x:
            pixels, x1, x2 = pixels[:, ::-1], width - x2, width - x1
        if self.flip_y:
            pixels, y1, y2 = pixels[::-1], height - y2, height - y1
        for _ in range(self.quarter_turns):
            x1, x2, y1, y2 = y1, y2, width - x2, width - x1
            height, width = width, height
        return Patch(np.rot90(pixels, self.quarter_turns), int(y1), int(x1))

    def draw(
        self,
        polygons: Sequence[np.ndarray],  # float64 [k, 2] each, source pixels
    ) -> Patch:
        """Polygons as a mask in sample pixels, drawn at the sample's own resolution."""
        mapped = [self.map_points(points) for points in polygons]
        corners = np.concatenate(mapped)
        height, width = self.shown
        x1, y1 = np.clip(np.floor(corners.min(axis=0)), 0, [width, height]).astype(int).tolist()
        x2, y2 = np.clip(np.ceil(corners.max(axis=0)), 0, [width, height]).astype(int).tolist()
        if x1 == x2 or y1 == y2:
            return Patch(np.zeros((0, 0), np.uint8), 0, 0)
        return Patch(draw_polygons([points - (x1, y1) for points in mapped], y2 - y1, x2 - x1), y1, x1)

    @staticmethod
    def _nearest(start: int, length: int, source: int, resized: int) -> np.ndarray:
        """int64 [length]: the source pixel under each resized pixel's centre."""
        # floor((i + 0.5) * source / resized), in whole numbers so that ties fall the same way everywhere.
        return (2 * np.arange(start, start + length) + 1) * source // (2 * resized)

    def map_picture(self, picture: Image.Image) -> Tensor:
        """The sample's pixels, uint8 [3, h, w]: bilinear, with a low-pass when shrinking.

        Args:
            picture: RGB, of the `source` size.
        """
        top, left, height, width = self.window
        if self.resized != self.source:
            scale_y, scale_x = self.source[0] / self.resized[0], self.source[1] / self.resized[1]
            box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
            # Rounding may lead a hair beyond the picture, which Pillow refuses.
            box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
            picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
        elif (height, width) != self.source:
            picture = picture.crop((left, top, left + width, top + height))
        if self.flip_x:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.flip_y:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self.quarter_turns:
            picture = picture.transpose(_TURNS[self.quarter_turns])
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # [h, w, 3] -> [3, h, w]
        if self.size == self.shown:
            return pixels.contiguous()
        padded = torch.tensor(_PAD_COLOR, dtype=torch.uint8).view(3, 1, 1).repeat(1, *self.size)  # [3, H, W]
        padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return padded
