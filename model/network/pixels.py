"""Pictures in any form to pixels: what a person sees, as 8-bit RGB or floats in 0..1."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_WHITE = (255, 255, 255, 255)


def picture_to_rgb(picture: Image.Image) -> np.ndarray:
    """An opened picture as uint8 [H, W, 3] RGB, the way a viewer shows it.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled by its full range, and greyscale,
    palette and CMYK pictures are converted.

    Raises:
        ValueError: float or 32-bit pictures, whose range nobody knows; several frames; an empty picture.
        OSError: the file is truncated or broken.
    """
    if getattr(picture, "n_frames", 1) > 1:
        raise ValueError(f"the picture has {picture.n_frames} frames or pages; send them one by one")
    if 0 in picture.size:
        raise ValueError(f"the picture is empty: {picture.height} x {picture.width}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint16)
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"the picture has mode {picture.mode} (32 bits a pixel) whose range is unknown; convert it to 8 or 16 bits"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture)
    return np.array(picture.convert("RGB"))


def image_tensor(image: Any) -> Tensor:
    """A picture in any accepted form as a tensor.

    Args:
        image: a path, a PIL picture, a uint8 array [H, W, 3] RGB, or a tensor [3, H, W], uint8 or float in 0..1.

    Returns:
        Tensor[3, H, W] on the CPU: uint8, or float as it came.

    Raises:
        FileNotFoundError: no such file.
        TypeError: another kind of thing, or another dtype.
        ValueError: a shape or values that do not fit, or a file that is no picture.
    """
    if isinstance(image, str | os.PathLike):
        image = _read(image)
    elif isinstance(image, Image.Image):
        image = picture_to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(
                f"an array must be uint8 [H, W, 3] RGB, got {image.dtype}; floats in 0..1 go in as a tensor [3, H, W]"
            )
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"an array must be [H, W, 3] with H, W > 0, got {list(image.shape)}")
        # torch warns of arrays that it must not write to, such as np.asarray(picture)
        image = np.ascontiguousarray(image) if image.flags.writeable else image.copy()
        return torch.from_numpy(image).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"a picture must be a path, a PIL picture, a uint8 array or a tensor, got {type(image).__name__}"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor must be uint8 or float in 0..1, got {image.dtype}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"a tensor must be [3, H, W] with H, W > 0, got {list(image.shape)}")
    image = image.detach().cpu()
    if image.is_floating_point() and not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError("a float tensor must hold values in 0..1 only; uint8 tensors hold 0..255")
    return image


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no picture at {os.fspath(path)}")
    try:
        with Image.open(path) as picture:
            return picture_to_rgb(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's own words can hold the path and several lines
        reason = (
            "it is not a picture, or of an unknown kind" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        raise ValueError(f"cannot read {os.fspath(path)}: {reason}") from None
