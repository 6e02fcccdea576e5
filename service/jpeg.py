"""JPEG files by libjpeg-turbo itself: half the time of Pillow, and Python's lock is free all the while.

Pillow, which has the same library inside, copies a picture out of its own memory with the lock held, a millisecond for
each, which is what a server with many decode threads waits for. What is taken here is what both read alike, and any
file that is not quite sound is left to Pillow.
"""

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from dsg.model.network.pixels import exif_orientation

_AXES_SWAPPED = frozenset((5, 6, 7, 8))
# Once they are: by which orientations rows run from the bottom up, columns from the right to the left.
_FROM_BOTTOM = frozenset((3, 4, 7, 8))
_FROM_RIGHT = frozenset((2, 3, 6, 7))


def jpeg_pixels(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """The pixels that `upright_rgb` would give, or None where it should.

    Args:
        image: the file, opened and not loaded; its size has been checked.
        data: the whole file.

    Returns:
        uint8 [H, W, 3] RGB, EXIF orientation applied.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != image.size:  # a file with two headers; the size that was checked is Pillow's
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # unsound, and Pillow says how; or sound enough for it
        return None
    return _upright(pixels, exif_orientation(image))


def _upright(stored: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation == 1:
        return stored
    turned = stored.swapaxes(0, 1) if orientation in _AXES_SWAPPED else stored
    rows = slice(None, None, -1 if orientation in _FROM_BOTTOM else 1)
    columns = slice(None, None, -1 if orientation in _FROM_RIGHT else 1)
    return np.ascontiguousarray(turned[rows, columns])
