"""Sizes of pictures on their way into the network. Always (height, width), in pixels."""

from dsg.model.network.info import Resize

STRIDE = 32
"""Batches are padded to multiples of this, so that every level of the pyramid divides evenly."""


def padded_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) rounded up to a multiple of `STRIDE`."""
    # As so many times `STRIDE`: torch.export then knows that the sides of levels are even, and records no guard of it.
    return STRIDE * ((height + STRIDE - 1) // STRIDE), STRIDE * ((width + STRIDE - 1) // STRIDE)


def resized_size(height: int, width: int, how: Resize) -> tuple[int, int]:
    """(height, width) after the resize; at least one pixel stays."""
    scale = min(how.short_side / min(height, width), how.long_side / max(height, width))
    half = 0.5 if how.rounding == "nearest" else 0.0
    return max(int(height * scale + half), 1), max(int(width * scale + half), 1)
