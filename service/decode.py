"""Bytes of a file -> pixels as a person sees them, or a `Problem` that says why not.

What a file is, its content says, never its name or declared type. The size is read from the header, before a
pixel is decoded. Nothing is guessed: what cannot be shown faithfully in 8 bits RGB is refused.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

from dsg.service.problems import Problem

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What is taken, in Pillow's names."""

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0
_SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
            _check_single(image)
            image.load()
            pixels = _to_rgb(_upright(image))
    except Problem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(max_pixels) from None
    except MemoryError:
        raise
    except Exception:
        # Pillow's readers raise whatever their parsing trips over: OSError, SyntaxError, struct.error,
        # KeyError ... The file is the cause of all of them.
        raise Problem(400, "broken_picture", "the picture is broken or cut short; send the whole file") from None
    return pixels


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header alone: type and size."""
    if not data:
        raise Problem(400, "empty_picture", "the picture is empty: 0 bytes")
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


def _check_single(image: Image.Image) -> None:
    # A phone's "MPO" is a JPEG whose further pictures are a depth or brightness map of the first: that one
    # counts.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        detail = "several pages or frames in one file; send each as its own picture"
        raise Problem(415, "several_frames", detail)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation (TIFF's was applied while loading, and its tag is gone)."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Broken EXIF beside a sound picture: every viewer shows it as it lies.
        orientation = 1
    method = _UPRIGHT_BY_ORIENTATION.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:  # [H, W, 3]
    if image.mode in _SIXTEEN_BIT_GREY:
        image = _to_eight_bits(image)
    if image.mode in ("I", "F", "LAB"):
        kind = {"I": "32-bit integer", "F": "floating-point", "LAB": "CIE L*a*b*"}[image.mode]
        detail = f"{kind} pixels have no agreed brightness; send 8 or 16 bits, grey or RGB"
        raise Problem(415, "unsupported_pixels", detail)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey or RGBA: 65535 becomes 255. Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.uint32)  # [H, W]
    top = 65535
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        top = (1 << image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]) - 1  # Pillow reads 12 bits unscaled
        if image.tag_v2.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
            values = top - values
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    transparent = image.info.get("transparency")  # PNG: the one grey level that shows what lies behind
    if transparent is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)]))
