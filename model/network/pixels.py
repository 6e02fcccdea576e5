"""Pictures in any form to pixels: what a person sees, as 8-bit RGB. Needs no torch.

`upright_rgb` is what turns an opened picture into RGB; the data room and the service call it too, the latter for all
but plain JPEG, which `dsg.service.jpeg` decodes to the same pixels.
"""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""From one level of grey to the next, by how a PNG has it in Pillow's words."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""
# The same for an array [H, W, 3]: which have their axes swapped, and whose rows then run from the bottom up, columns
# from the right to the left.
_AXES_SWAPPED = frozenset((5, 6, 7, 8))
_FROM_BOTTOM = frozenset((3, 4, 7, 8))
_FROM_RIGHT = frozenset((2, 3, 6, 7))


class SeveralFramesError(ValueError):
    """A file with more than one picture; one line, without the file's name."""


class UnknownRangeError(ValueError):
    """Pixels that have no agreed brightness; one line, without the file's name."""


def exif_orientation(picture: Image.Image) -> int:
    """1..8 as EXIF counts them: 1 lies as stored, and so does what has no tag, a broken one or an unknown number.

    Pillow turns a TIFF upright while it decodes it, and takes its tag away: ask before that for what the file says.
    """
    _scale_transparent_level(picture)  # Pillow decodes a PNG for its EXIF, which may lie behind the pixels
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Broken EXIF beside a sound picture raises nearly anything, and every viewer shows the picture as it lies.
        return 1
    return orientation if orientation in _UPRIGHT else 1


def upright_rgb(picture: Image.Image) -> Image.Image:
    """An opened picture as 8-bit RGB, the way a viewer shows it.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled by its whole range (65535 becomes
    255; 12-bit and inverted TIFF by theirs), and greyscale, palette and CMYK are converted.

    Returns:
        A picture of mode RGB that shares nothing with `picture`.

    Raises:
        SeveralFramesError: several pages or frames. A phone's MPO counts as one JPEG: its further pictures are
            previews or depth maps of the first.
        UnknownRangeError: 32-bit or floating-point numbers, or CIE L*a*b*.
        ValueError: the picture is empty.
        Exception: whatever Pillow's decoder of a broken file trips over.
    """
    # Not `n_frames`, for which Pillow walks all pages of a TIFF, in the square of their number.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise SeveralFramesError("the picture has 2 pages or frames, or more; give each as a picture of its own")
    if 0 in picture.size:
        raise ValueError(f"the picture is empty: {picture.height} x {picture.width}")
    _scale_transparent_level(picture)
    picture.load()
    # Older versions of Pillow open 16-bit PNG as mode I.
    is_sixteen_bit = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if picture.mode in ("I", "F", "LAB") and not is_sixteen_bit:
        kind = {"I": "32-bit integer", "F": "floating-point", "LAB": "CIE L*a*b*"}[picture.mode]
        raise UnknownRangeError(
            f"the picture's {kind} pixels have no known range; convert it to 8 or 16 bits, grey or RGB"
        )
    method = _UPRIGHT.get(exif_orientation(picture))
    image = _eight_bits(picture) if is_sixteen_bit else picture
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    return image if method is None else image.transpose(method)


def as_stored(upright: Image.Image, orientation: int) -> Image.Image:
    """The pixels of `upright_rgb` as they lie in a file of this EXIF orientation."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)  # all the others undo themselves
    return upright.transpose(_UPRIGHT[inverse]) if inverse in _UPRIGHT else upright


def turned_upright(stored: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] as they lie in a file of this EXIF orientation, the way a viewer shows them."""
    if orientation == 1:
        return stored
    turned = stored.swapaxes(0, 1) if orientation in _AXES_SWAPPED else stored
    rows = slice(None, None, -1 if orientation in _FROM_BOTTOM else 1)
    columns = slice(None, None, -1 if orientation in _FROM_RIGHT else 1)
    return np.ascontiguousarray(turned[rows, columns])


def _scale_transparent_level(picture: Image.Image) -> None:
    """Of a PNG of 2 or 4 bits of grey, which Pillow scales to 0..255 but for the level that is transparent.

    How many bits there were is known until the picture is decoded. A level that is scaled already stays as it is.
    """
    tiles = getattr(picture, "tile", [])
    step = _GREY_STEPS.get(tiles[0][3]) if picture.format == "PNG" and tiles else None
    if step and "transparency" in picture.info:
        bits = 255 // step  # all that a level may have set
        picture.info["transparency"] = (picture.info["transparency"] & bits) * step


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey, or grey and alpha. Pillow's own conversion would clip at 255."""
    values = np.asarray(picture).astype(np.uint32)  # [H, W]
    top = 65535
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        top = (1 << picture.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]) - 1  # Pillow reads 12 bits unscaled
        if picture.tag_v2.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
            values = top - values
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    transparent = picture.info.get("transparency")  # PNG: the one grey level that shows what lies behind
    if transparent is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)]))


def picture_array(image: Any) -> NDArray[np.uint8]:
    """A picture in any form that needs no torch, as pixels.

    Args:
        image: a path, a PIL picture, or a uint8 array [H, W, 3] RGB.

    Returns:
        uint8 [H, W, 3] RGB.

    Raises:
        FileNotFoundError: no such file.
        TypeError: another kind of thing, or another dtype.
        ValueError: a shape that does not fit, or a file that is no picture.
    """
    if isinstance(image, str | os.PathLike):
        image = _read(image)
    elif isinstance(image, Image.Image):
        image = np.array(upright_rgb(image))
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"a picture must be a path, a PIL picture, a uint8 array or a tensor, got {type(image).__name__}"
        )
    if image.dtype != np.uint8:
        raise TypeError(
            f"an array must be uint8 [H, W, 3] RGB, got {image.dtype}; floats in 0..1 go in as a tensor [3, H, W]"
        )
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an array must be [H, W, 3] with H, W > 0, got {list(image.shape)}")
    return image


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no picture at {os.fspath(path)}")
    try:
        with Image.open(path) as picture:
            return np.array(upright_rgb(picture))
    except Image.UnidentifiedImageError:  # whose own words hold the path once more
        raise ValueError(f"cannot read {os.fspath(path)}: it is not a picture, or of an unknown kind") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"cannot read {os.fspath(path)}: {error}") from None
