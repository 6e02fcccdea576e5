"""The one level or colour that shows what lies behind (tRNS), in PNG of every depth; levels worked out by hand."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decode_pictures import MAX_PIXELS, chunk, png

from dsg.model.data.pixels import read_picture
from dsg.service.decode import decode_picture


@pytest.mark.parametrize("has_exif_first", [False, True])
@pytest.mark.parametrize(
    ("bits", "row", "level", "expected"),
    [
        (1, [0b01000000], 0, [255, 255]),  # levels 0, 1: the black one is not seen
        (1, [0b01000000], 1, [0, 255]),
        (2, [0b00011011], 0, [255, 85, 170, 255]),  # levels 0, 1, 2, 3
        (2, [0b00011011], 1, [0, 255, 170, 255]),
        (2, [0b00011011], 2, [0, 85, 255, 255]),
        (2, [0b00011011], 3, [0, 85, 170, 255]),
        (2, [0b00011011], 6, [0, 85, 255, 255]),  # of its 16 bits the last two count
        (4, [0x01, 0x5E], 0, [255, 17, 85, 238]),  # levels 0, 1, 5, 14
        (4, [0x01, 0x5E], 1, [0, 255, 85, 238]),
        (4, [0x01, 0x5E], 5, [0, 17, 255, 238]),
        (4, [0x01, 0x5E], 14, [0, 17, 85, 255]),
        (4, [0x01, 0x5E], 9, [0, 17, 85, 238]),
        (8, [0, 1, 5, 85], 1, [0, 255, 5, 85]),
        (8, [0, 1, 5, 85], 85, [0, 1, 5, 255]),
        (16, [2, 2, 2, 3], 515, [2, 255]),  # 514, 515
    ],
)
def test_the_transparent_level_of_grey_of_any_depth(
    bits: int, row: list[int], level: int, expected: list[int], has_exif_first: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, so that its place in the file is seen to make no difference
    orientation, level_chunk = chunk(b"eXIf", exif.tobytes()), chunk(b"tRNS", struct.pack(">H", level))
    extra = orientation + level_chunk if has_exif_first else level_chunk
    data = png(len(expected), 1, bits=bits, rows=bytes([0, *row]), extra=extra)
    shown = expected[::-1] if has_exif_first else expected
    assert decode_picture(data, MAX_PIXELS)[0].tolist() == [[grey] * 3 for grey in shown]


def test_the_data_room_sees_the_same_transparent_level(tmp_path: Path) -> None:
    data = png(4, 1, bits=2, rows=b"\0\x1b", extra=chunk(b"tRNS", b"\0\1"))
    (tmp_path / "a.png").write_bytes(data)
    assert np.array(read_picture(tmp_path / "a.png", (1, 4)))[0, :, 0].tolist() == [0, 255, 170, 255]


def test_small_palettes_and_deep_rgb_with_transparency() -> None:
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    for bits, row in ((2, [0b00011000]), (4, [0x01, 0x20])):
        data = png(3, 1, bits=bits, colour=3, rows=bytes([0, *row]), extra=palette + chunk(b"tRNS", b"\xff\0"))
        assert decode_picture(data, MAX_PIXELS).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    row = bytes([0, 1, 2, 3, 4, 5, 6])
    data = png(2, 1, colour=2, rows=row, extra=chunk(b"tRNS", struct.pack(">3H", 4, 5, 6)))
    assert decode_picture(data, MAX_PIXELS).tolist() == [[[1, 2, 3], [255, 255, 255]]]
