"""TIFF files whose cost their size and number of pixels do not bound, known by their first directory alone.

Pillow makes an object for each strip or tile that a file lists, however few its pixels are, and libtiff decodes whole
tiles, however little of them lies in the picture: 64 kB may take minutes, 2 MB as many GB.
"""

import struct

from dsg.service.problems import Problem

MOST_NUMBERS = 600_000
"""In all tags together: 64 million pixels in tiles of 16 x 16 need 500,000, an offset and a length of each."""

SIGNATURES = (b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0", b"MM\0+")
"""Those that Pillow takes; the + is BigTIFF."""

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
# The types that libtiff takes for a width, in the letters of `struct`.
_WHOLE = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
# Types that are read at one go and may be long: text, XMP, colour profiles.
_OCTETS = frozenset((1, 2, 6, 7))


def refuse_endless_tiff(data: bytes, max_pixels: int) -> None:
    """Look at a file that begins with one of `SIGNATURES`; a broken directory is left to the decoders.

    Raises:
        Problem: 413 tiles that reach far beyond the picture; 415 too many strips, tiles or other numbers, or a
            big-endian BigTIFF, which Pillow reads as if it were none.
    """
    if data.startswith(b"MM\0+"):
        raise Problem(415, "unsupported_pixels", "a big-endian BigTIFF is not taken; save it as plain TIFF")
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2] == 43  # as Pillow tells it
    entry, offset = (order + "HHQ8s", order + "Q") if is_big else (order + "HHI4s", order + "I")
    try:
        (at,) = struct.unpack_from(offset, data, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, at)
    except struct.error:
        return
    start, size = at + (8 if is_big else 2), struct.calcsize(entry)
    end = start + min(count, (len(data) - start) // size) * size  # of one cut short, Pillow takes what is there
    numbers = 0
    sides: dict[int, int] = {}
    for tag, kind, length, value in struct.iter_unpack(entry, memoryview(data)[start:end]):
        numbers += 0 if kind in _OCTETS else length
        if tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT) and tag not in sides:  # libtiff takes the first
            sides[tag] = _whole_number(data, order, kind, value, offset)
    if numbers > MOST_NUMBERS:
        detail = f"a TIFF of more than {MOST_NUMBERS} strips, tiles and other numbers is not taken; save it anew"
        raise Problem(415, "unsupported_pixels", detail)
    if len(sides) < 4 or min(sides.values()) < 1:  # no tiles, or none that libtiff reads
        return
    across = -(-sides[_WIDTH] // sides[_TILE_WIDTH]) * sides[_TILE_WIDTH]
    down = -(-sides[_HEIGHT] // sides[_TILE_HEIGHT]) * sides[_TILE_HEIGHT]
    if across * down > 2 * max_pixels:
        detail = f"the tiles have {across} x {down} pixels in all, more than 2 x {max_pixels}; save it in smaller ones"
        raise Problem(413, "too_many_pixels", detail)


def _whole_number(data: bytes, order: str, kind: int, value: bytes, offset: str) -> int:
    """The first number of an entry, which lies in its value or where that points to; 0 where it is none."""
    if kind not in _WHOLE:
        return 0
    code = order + _WHOLE[kind]
    if struct.calcsize(code) <= len(value):
        return int(struct.unpack_from(code, value)[0])
    try:
        return int(struct.unpack_from(code, data, struct.unpack(offset, value)[0])[0])
    except struct.error:
        return 0
