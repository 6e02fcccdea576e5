"""A picture with its instances drawn on it."""

import colorsys
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dsg.service.polygons import mask_window

_OPACITY = 0.45
_GOLDEN_ANGLE = 0.381966  # of a turn: neighbours in the list get colours far apart, however many there are
_TEXT_SHARE = 1 / 50  # height of text, of the picture's shorter side
_TEXT_PIXELS = (10, 40)
_TEXT_TIMES_BOX = 2.0  # a name wider than this many times its box is left out


def colour_of(index: int) -> tuple[int, int, int]:
    """RGB, 0..255, of the instance with this index."""
    red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN_ANGLE % 1.0, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(
    pixels: NDArray[np.uint8],  # [H, W, 3]
    annotations: Sequence[dict[str, Any]],
    names: dict[int, str],
) -> Image.Image:
    """Draw the masks, boxes, names and scores of one picture.

    Args:
        pixels: uint8 [H, W, 3] RGB; left as it is.
        annotations: COCO annotations of this picture with RLE masks; the first is drawn on top.
        names: category id -> name.
    """
    canvas = pixels.copy()
    numbered = list(enumerate(annotations))
    for index, annotation in reversed(numbered):
        bits, top, left = mask_window(annotation["segmentation"])
        h, w = bits.shape
        window = canvas[top : top + h, left : left + w]  # [h, w, 3]
        tint = np.array(colour_of(index))
        window[bits] = np.round(window[bits] * (1 - _OPACITY) + tint * _OPACITY).astype(np.uint8)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    smallest, largest = _TEXT_PIXELS
    text_height = min(max(smallest, round(min(image.size) * _TEXT_SHARE)), largest)
    font = ImageFont.load_default(text_height)
    for index, annotation in reversed(numbered):
        x, y, width, height = annotation["bbox"]
        colour = colour_of(index)
        draw.rectangle((x, y, x + width, y + height), outline=colour, width=max(1, text_height // 8))
        text = f"{names[annotation['category_id']]} {annotation['score']:.2f}"
        if draw.textlength(text, font=font) > _TEXT_TIMES_BOX * width:
            continue  # names of a crowd of small things would hide the crowd
        corner = (x, max(0, y - text_height * 1.25))
        draw.rectangle(draw.textbbox(corner, text, font=font), fill=colour)
        draw.text(corner, text, fill="black", font=font)
    return image


def to_png(image: Image.Image) -> bytes:
    """Bytes of a PNG; compressed lightly, since the time to write it counts for more here than its size."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
