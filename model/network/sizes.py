"""Sizes of pictures on their way into the network. Always (height, width), in pixels."""

from dsg.model.network.info import Resize

STRIDE = 32
"""Batches are padded to multiples of this, so that every level of the pyramid divides evenly."""


def padded_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) rounded up to a multiple of `STRIDE`."""
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def resized_size(height: int, width: int, how: Resize) -> tuple[int, int]:
    """(height, width) after the resize: fractions of a pixel are cut off, at least one pixel stays."""
    scale = min(how.short_side / min(height, width), how.long_side / max(height, width))
    return max(int(height * scale), 1), max(int(width * scale), 1)
