"""JPEG files by libjpeg-turbo itself: half the time of Pillow, and Python's lock is free all the while.

Pillow, which has the same library inside, copies a picture out of its own memory with the lock held, a millisecond for
each, which is what a server with many decode threads waits for. What is taken here is what both read alike, and any
file that is not quite sound is left to Pillow.
"""

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from dsg.model.network.pixels import exif_orientation, turned_upright


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
    return turned_upright(pixels, exif_orientation(image))
