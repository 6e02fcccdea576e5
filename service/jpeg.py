"""JPEG files by libjpeg-turbo itself: half the time of Pillow, and Python's lock is free all the while.

Pillow, which has the same library inside, copies a picture out of its own memory with the lock held, a millisecond for
each, which is what a server with many decode threads waits for. What is taken here is what both read alike, and any
file that is not quite sound is left to Pillow.

A scan of a few bytes may go over all pixels, so the cap of pixels does not bound what a file costs:
`refuse_endless_jpeg` does, for both.
"""

import re

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from dsg.model.network.pixels import exif_orientation, turned_upright
from dsg.service.problems import Problem

MOST_SCANS = 64
"""Encoders write about 10. One over 64 million pixels takes libjpeg up to 0.1 s, however few bytes it has."""
_MOST_SEGMENTS = 2000
"""32 MB are 500 of the largest size. Pillow joins those of EXIF one by one, and copies what came before each time."""
_MOST_PADDING = 65536
"""Bytes between the segments of a header, where there should be none; Pillow reads each of them in Python."""

_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
# What ends the data of a scan, and nothing less: 00 follows an FF of the data, D0 to D7 are restarts within it, FF is
# filling, and what lies below C0 has no length either, so that to skip one would skip what libjpeg reads.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_PIECE = 1 << 17
"""Bytes searched at once: a search holds Python's lock, for 1 ms where all of them are FF."""


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


def refuse_endless_jpeg(data: bytes) -> None:
    """Refuse a JPEG file whose size and number of pixels do not bound the time that it takes.

    Raises:
        Problem: 415 more than `MOST_SCANS` scans; 400 a header of thousands of segments, or of padding.
    """
    # Each scan begins with two bytes that nearly every file has in few places, so that scans need not be told from what
    # else has them: thumbnails, comments, what follows the picture. Python's lock is free for most of this.
    pairs = (np.frombuffer(data, "<u2", (len(data) - first) // 2, first) for first in (0, 1))
    few = sum(np.count_nonzero(pair == _START_OF_SCAN << 8 | 0xFF) for pair in pairs) <= MOST_SCANS
    scans = padding = 0
    at = 2  # behind the start of the image
    for _ in range(_MOST_SEGMENTS):
        marker = _next_marker(data, at)
        if marker is None:  # cut short, which a decoder will say
            return
        if scans == 0:
            padding += marker - at
            if padding > _MOST_PADDING:
                break
        kind, at = data[marker + 1], marker + 2
        if kind == _END_OF_IMAGE:
            return
        if kind == _START_OF_IMAGE:
            continue
        if kind == _START_OF_SCAN:
            scans += 1
            if few:
                return
            if scans > MOST_SCANS:
                detail = f"a JPEG of more than {MOST_SCANS} scans is not taken; save it anew"
                raise Problem(415, "unsupported_pixels", detail)
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    detail = f"the JPEG has more than {_MOST_SEGMENTS} segments, or {_MOST_PADDING} bytes between them; save it anew"
    raise Problem(400, "broken_picture", detail)


def _next_marker(data: bytes, start: int) -> int | None:
    for at in range(start, len(data), _PIECE):
        found = _MARKER.search(data, at, at + _PIECE + 1)  # one that begins in this piece
        if found:
            return found.start()
    return None
