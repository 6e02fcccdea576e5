"""What a training picture goes through: an `AugmentConfig` says how much, `Augment` draws it for one sample.

All geometry of a sample (resize, crop, flips, turns) is drawn as one `View`, so that pixels are resampled
once and masks are only made where they will be seen. Colours follow, through torchvision's v2 functions.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional

from dsg.model.data.view import View


@dataclass(frozen=True)
class AugmentConfig:
    """How training pictures are varied. The defaults are the paper's: short side 800, half are flipped."""

    short_sides: tuple[int, ...] = (800,)
    """Pixels: lengths that the short side is drawn from; none: pictures keep their size. `crop_size` goes
    first."""
    short_side_range: bool = False
    """Draw any whole length from the smallest to the largest of `short_sides`, not only those listed."""
    long_side: int = 1333
    """Pixels: limit of the long side; the short side then gets shorter. Not used with `crop_size`."""
    crop_size: int = 0
    """Pixels: side of a square that each picture is cut and padded to (large-scale jitter); 0: no square."""
    scale_range: tuple[float, float] = (0.1, 2.0)
    """With `crop_size`: how large the picture is before the cut; at 1 its long side fits the square."""
    horizontal_flip: float = 0.5
    """Probability, 0 to 1, of swapping left and right."""
    vertical_flip: float = 0.0
    """Probability, 0 to 1, of swapping top and bottom: for pictures without an upright, as in microscopy."""
    quarter_turn: float = 0.0
    """Probability, 0 to 1, of a turn by 90, 180 or 270 degrees; for pictures without an upright."""
    color_jitter: float = 0.0
    """Probability, 0 to 1, with which each of the four colour changes below is made."""
    brightness: float = 0.2
    """Largest change of the brightness factor: drawn from 1 - brightness to 1 + brightness; 0 to 1."""
    contrast: float = 0.2
    """Largest change of the contrast factor, 0 to 1."""
    saturation: float = 0.2
    """Largest change of the saturation factor, 0 to 1."""
    hue: float = 0.0
    """Largest turn of the hue, as a share of the colour circle, 0 to 0.5. Slow: about 15 ms for 480 x 480."""
    copy_paste: float = 0.0
    """Probability, 0 to 1, that masked objects of another picture are pasted in."""
    min_visible: float = 0.1
    """Share of an object's box, 0 to 1, that a crop must leave; below it the object is dropped."""
    min_side: float = 1.0
    """Pixels: objects whose box gets narrower or lower than this are dropped."""

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "vertical_flip", "quarter_turn", "copy_paste", "min_visible"):
            _within(name, getattr(self, name), 0.0, 1.0)
        for name in ("color_jitter", "brightness", "contrast", "saturation"):
            _within(name, getattr(self, name), 0.0, 1.0)
        _within("hue", self.hue, 0.0, 0.5)
        if any(side < 1 for side in self.short_sides):
            raise ValueError(f"augment.short_sides is {list(self.short_sides)}; each must be 1 pixel or more")
        if self.short_side_range and len(self.short_sides) < 2:
            raise ValueError(f"augment.short_side_range needs two augment.short_sides, got {list(self.short_sides)}")
        if self.crop_size < 0:
            raise ValueError(f"augment.crop_size is {self.crop_size}; it must be 0 (off) or pixels")
        if not self.crop_size and self.short_sides and self.long_side < max(self.short_sides):
            raise ValueError(
                f"augment.long_side = {self.long_side} is below the largest of augment.short_sides "
                f"{list(self.short_sides)}: raise it"
            )
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"augment.scale_range is {[low, high]}; it must be two rising factors above 0")
        if not self.min_side > 0:
            raise ValueError(f"augment.min_side is {self.min_side}; it must be above 0 pixels")

    @property
    def same_shape(self) -> bool:
        """Whether all samples come out at one shape, so that grouping them by aspect ratio has no use."""
        return self.crop_size > 0


class Augment:
    """Draws one sample's geometry and colours from its own generator."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def draw_view(
        self,
        size: tuple[int, int],  # (height, width) of the picture
        rng: np.random.Generator,
    ) -> View:
        """Resize, crop, flips and turn of one sample, as one map from the picture to the sample."""
        config = self.config
        if config.crop_size:
            resized = self._jittered_size(size, rng)
            window = (min(resized[0], config.crop_size), min(resized[1], config.crop_size))
        else:
            resized = self._short_side_size(size, rng)
            window = resized
        top = int(rng.integers(resized[0] - window[0] + 1))
        left = int(rng.integers(resized[1] - window[1] + 1))
        return View(
            source=size,
            resized=resized,
            window=(top, left, *window),
            flip_x=bool(rng.random() < config.horizontal_flip),
            flip_y=bool(rng.random() < config.vertical_flip),
            quarter_turns=int(rng.integers(1, 4)) if rng.random() < config.quarter_turn else 0,
            canvas=(config.crop_size, config.crop_size) if config.crop_size else None,
        )

    def _jittered_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        scale = float(rng.uniform(*self.config.scale_range)) * self.config.crop_size / max(size)
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def _short_side_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        config = self.config
        if not config.short_sides:
            return size
        if config.short_side_range:
            side = int(rng.integers(min(config.short_sides), max(config.short_sides) + 1))
        else:
            side = config.short_sides[int(rng.integers(len(config.short_sides)))]
        scale = min(side / min(size), config.long_side / max(size))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def change_colors(
        self,
        image: Tensor,  # uint8 [3, H, W]
        rng: np.random.Generator,
    ) -> Tensor:
        """The picture with brightness, contrast, saturation and hue changed, in any order: uint8 [3, H,
        W]."""
        config = self.config
        if not config.color_jitter:
            return image
        changes = (
            (functional.adjust_brightness, config.brightness, 1.0),
            (functional.adjust_contrast, config.contrast, 1.0),
            (functional.adjust_saturation, config.saturation, 1.0),
            (functional.adjust_hue, config.hue, 0.0),
        )
        for which in rng.permutation(len(changes)):
            change, spread, neutral = changes[which]
            if spread and rng.random() < config.color_jitter:
                image = change(image, float(rng.uniform(neutral - spread, neutral + spread)))
        return image


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"augment.{name} is {value}; it must lie in {low:g} to {high:g}")
