"""Bytes of a file -> pixels as a person sees them, or a `Problem` that says why not.

What a file is, its content says, never its name or declared type. The size is read from the header, before a
pixel is decoded. Nothing is guessed: what cannot be shown faithfully in 8 bits RGB is refused.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsg.model.network.pixels import SeveralFramesError, UnknownRangeError, upright_rgb
from dsg.service.jpeg import jpeg_pixels, refuse_endless_jpeg
from dsg.service.problems import Problem, is_shortage
from dsg.service.tiff import SIGNATURES, refuse_endless_tiff

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What is taken, in Pillow's names."""

# Other picture files by their first bytes: a person is better told "GIF is not taken" than "not a picture".
_OTHER_SIGNATURES = (
    (0, b"GIF8", "GIF"),
    (0, b"%PDF-", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"<svg", "SVG"),
)


def guard_decoding() -> None:
    """Once in a process that serves: what is wrong with a picture is told to its sender, not to the console.

    Pillow's readers are loaded now: where there are no descriptors left, they would be missing for good.
    """
    Image.init()
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode_picture(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decode one file.

    Args:
        data: the whole file: JPEG, PNG, WebP, BMP or TIFF.
        max_pixels: cap of width * height, from the header.

    Returns:
        uint8 [H, W, 3] RGB, EXIF orientation applied, transparency composed on white.

    Raises:
        Problem: 400 not a picture, or a broken one; 413 too many pixels; 415 a type, or a kind of pixels,
            that is not taken.
    """
    try:
        with _open(data, max_pixels) as image:
            fast = jpeg_pixels(image, data)
            return np.array(upright_rgb(image)) if fast is None else fast
    except Problem:
        raise
    except SeveralFramesError as error:
        raise Problem(415, "several_frames", str(error)) from None
    except UnknownRangeError as error:
        raise Problem(415, "unsupported_pixels", str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(max_pixels) from None
    except Exception as error:
        if is_shortage(error):
            raise
        # Pillow's readers raise whatever their parsing trips over: OSError, SyntaxError, struct.error,
        # KeyError ... The file is the cause of all of them.
        raise Problem(400, "broken_picture", "the picture is broken or cut short; send the whole file") from None


def pixels_of(data: bytes, max_pixels: int) -> int:
    """Pixels of a file by its header; 0 where `decode_picture` will say what is wrong with it."""
    try:
        with _open(data, max_pixels) as image:
            return image.width * image.height
    except Exception as error:
        if is_shortage(error):
            raise
        return 0  # as above


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header alone: type and size, and what makes a decoder work without an end."""
    if not data:
        raise Problem(400, "empty_picture", "the picture is empty: 0 bytes")
    if data.startswith(b"\xff\xd8"):
        refuse_endless_jpeg(data)
    elif data.startswith(SIGNATURES):
        refuse_endless_tiff(data, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        for offset, signature, name in _OTHER_SIGNATURES:
            if data[offset : offset + len(signature)] == signature:
                detail = f"{name} is not taken; send JPEG, PNG, WebP, BMP or TIFF"
                raise Problem(415, "unsupported_type", detail) from None
        detail = "not a picture in JPEG, PNG, WebP, BMP or TIFF, or broken in its header"
        raise Problem(400, "not_a_picture", detail) from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise _too_many_pixels(max_pixels, f"{width} x {height} is ")
    return image


def _too_many_pixels(max_pixels: int, size: str = "") -> Problem:
    return Problem(413, "too_many_pixels", f"{size}more than {max_pixels} pixels; send a smaller picture")
