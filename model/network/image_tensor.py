"""Pictures in any form, and their resize, as tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsg.model.network.info import Resize
from dsg.model.network.pixels import picture_array
from dsg.model.network.sizes import resized_size


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
    if not isinstance(image, Tensor):
        array = picture_array(image)
        # torch warns of arrays that it must not write to, such as np.asarray(picture)
        array = np.ascontiguousarray(array) if array.flags.writeable else array.copy()
        return torch.from_numpy(array).permute(2, 0, 1)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor must be uint8 or float in 0..1, got {image.dtype}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"a tensor must be [3, H, W] with H, W > 0, got {list(image.shape)}")
    image = image.detach().cpu()
    if image.dtype in (torch.float16, torch.bfloat16):
        image = image.float()  # the CPU's resize has no half precision
    if image.is_floating_point() and not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError("a float tensor must hold values in 0..1 only; uint8 tensors hold 0..255")
    return image


def resize(pixels: Tensor, how: Resize) -> Tensor:
    """Scale a picture, keeping its shape.

    Args:
        pixels: Tensor[3, H, W], uint8 or float in 0..1.

    Returns:
        Tensor[3, h, w]: uint8 when that came in and the resize has a low-pass or nothing to do, else float in 0..1.
        Without the low-pass numbers are kept unrounded, as the libraries whose convention that is have it.
    """
    height, width = pixels.shape[-2:]
    size = resized_size(height, width, how)
    if size == (height, width):
        return pixels  # as it lies: turning it round is for the device that will read it
    return scaled(pixels, size, how.antialias)


def scaled(pixels: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Pixels [3, H, W] at another size, as `resize` gives them; on any device."""
    if pixels.dtype == torch.uint8 and not antialias:
        pixels = pixels.float() / 255
    return functional.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]
