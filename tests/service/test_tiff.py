"""TIFF directories that promise more work than their pixels are refused before a decoder sees them; others are read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dsg.service.decode import decode_picture, pixels_of
from dsg.service.problems import Problem

MAX_PIXELS = 100_000
MOST_NUMBERS = 600_000
SHORT, LONG, RATIONAL, LONG8, SLONG8, IFD8 = 3, 4, 5, 16, 17, 18


def directory(order: str, entries: list[tuple[int, int, int, int]], data: bytes = b"", is_big: bool = False) -> bytes:
    """A TIFF of one directory (tag, type, count, value or place) behind `data`, which begins at byte 8, or 16."""
    letters = b"II" if order == "<" else b"MM"
    if is_big:
        head = letters + struct.pack(order + "HHHQ", 43, 8, 0, 16 + len(data)) + data
        return head + struct.pack(order + "Q", len(entries)) + _entries(order, entries, "Q") + bytes(8)
    head = letters + struct.pack(order + "HI", 42, 8 + len(data)) + data
    return head + struct.pack(order + "H", len(entries)) + _entries(order, entries, "I") + bytes(4)


def _entries(order: str, entries: list[tuple[int, int, int, int]], wide: str) -> bytes:
    def value(kind: int, count: int, number: int) -> bytes:
        code = {SHORT: "H", LONG: "I"}.get(kind, wide) if count == 1 else wide
        return struct.pack(order + code, number).ljust(struct.calcsize(wide), b"\0")

    return b"".join(
        struct.pack(order + "HH" + wide, tag, kind, count) + value(kind, count, number)
        for tag, kind, count, number in entries
    )


def strips(width: int, height: int, at: int, count: int, extra: list[tuple[int, int, int, int]]) -> list:
    """8-bit grey, not compressed, in strips of one row."""
    sides = [(256, LONG, 1, width), (257, LONG, 1, height), (258, SHORT, 1, 8), (259, SHORT, 1, 1), (262, SHORT, 1, 1)]
    return [*sides, (273, LONG, count, at), (277, SHORT, 1, 1), (278, LONG, 1, 1), *extra]


def tiles(tile: int, kind: int, data: bytes, order: str = "<", is_big: bool = False, first: tuple = ()) -> bytes:
    """An 8 x 8 picture in one tile of `tile` x `tile` grey pixels, deflated."""
    place = 16 if is_big else 8
    sides = [(256, SHORT, 1, 8), (257, SHORT, 1, 8), (258, SHORT, 1, 8), (259, SHORT, 1, 8), (262, SHORT, 1, 1)]
    at = [(324, LONG, 1, place), (325, LONG, 1, len(data))]
    grid = [(322, kind, 1, tile), (323, kind, 1, tile)]
    return directory(order, [*sides, (277, SHORT, 1, 1), *first, *grid, *at], data, is_big)


def problem(data: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("the file went to a decoder"))
    with pytest.raises(Problem) as caught:
        decode_picture(data, MAX_PIXELS)
    assert pixels_of(data, MAX_PIXELS) == 0
    return caught.value.status, caught.value.reason


@pytest.mark.parametrize(("order", "is_big"), [("<", False), (">", False), ("<", True)])
def test_more_strips_than_a_picture_may_need(order: str, is_big: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place, rows = (16 if is_big else 8), 700
    sound = struct.pack(order + "I", place) * rows
    few = directory(order, strips(4, rows, place, rows, []), sound, is_big)
    np.testing.assert_array_equal(decode_picture(few, MAX_PIXELS)[0, :, 0], list(sound[:4]))
    many = struct.pack(order + "I", place) * MOST_NUMBERS
    data = directory(order, strips(4, 2, place, MOST_NUMBERS, []), many, is_big)
    assert problem(data, monkeypatch) == (415, "unsupported_pixels")


def test_more_numbers_than_a_resolution_has(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = struct.pack("<2I", 8, 1) * MOST_NUMBERS
    data = directory("<", strips(4, 1, 8, 1, [(282, RATIONAL, MOST_NUMBERS, 8)]), numbers)
    assert problem(data, monkeypatch) == (415, "unsupported_pixels")


def test_a_directory_cut_short_counts_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = struct.pack("<I", 8) * MOST_NUMBERS
    data = directory("<", strips(4, 2, 8, MOST_NUMBERS, []), many)
    at = 8 + len(many)
    assert problem(data[:at] + b"\xff\xff" + data[at + 2 :], monkeypatch) == (415, "unsupported_pixels")


def test_long_text_is_no_list_of_numbers() -> None:
    text = b"<xmp>" * 200_000
    data = directory("<", strips(4, 1, 8, 1, [(700, 1, len(text), 8)]), text)
    assert decode_picture(data, MAX_PIXELS)[0, :, 0].tolist() == list(b"<xmp")


@pytest.mark.parametrize("is_big", [False, True])
@pytest.mark.parametrize("kind", [SHORT, LONG])
def test_a_tile_larger_than_its_picture(kind: int, is_big: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is common is decoded; one of 2,000 times as many pixels is not."""
    levels = np.arange(256 * 256).reshape(256, 256) % 251
    sound = tiles(256, kind, zlib.compress(levels.astype(np.uint8).tobytes()), is_big=is_big)
    np.testing.assert_array_equal(decode_picture(sound, MAX_PIXELS)[..., 0], levels[:8, :8])
    hostile = tiles(4096, kind, zlib.compress(bytes(4096 * 4096)), is_big=is_big)
    assert problem(hostile, monkeypatch) == (413, "too_many_pixels")


def test_big_endian_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = tiles(4096, SHORT, zlib.compress(bytes(4096 * 4096)), ">")
    assert problem(hostile, monkeypatch) == (413, "too_many_pixels")


@pytest.mark.parametrize("kind", [LONG8, SLONG8, IFD8])
def test_a_second_side_of_a_tile_does_not_hide_the_first(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow does not know all these types and would take the second; libtiff takes the first, from where it points."""
    packed = zlib.compress(bytes(4096 * 4096))
    data = packed + struct.pack("<q", 4096)
    first = ((322, kind, 1, 8 + len(packed)), (323, kind, 1, 8 + len(packed)))
    assert problem(tiles(16, SHORT, data, first=first), monkeypatch) == (413, "too_many_pixels")


def test_big_endian_bigtiff_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    data = directory(">", strips(4, 1, 16, 1, []), bytes(4), is_big=True)
    assert problem(data, monkeypatch) == (415, "unsupported_pixels")


@pytest.mark.parametrize(
    "data", [b"II*\0", b"II*\0\xff\xff\xff\xff", b"II+\0" + b"\xff" * 20, b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_broken_directory_is_a_broken_picture(data: bytes) -> None:
    with pytest.raises(Problem) as caught:
        decode_picture(data, MAX_PIXELS)
    assert caught.value.status == 400


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1"])
def test_what_pillow_writes_is_taken(mode: str, compression: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (301, 300)).save(file, "TIFF", compression=compression)
    assert decode_picture(file.getvalue(), MAX_PIXELS).shape == (300, 301, 3)
