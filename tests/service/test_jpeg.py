"""JPEG files by libjpeg-turbo: pixel for pixel what Pillow reads, and Pillow's where a file is not sound."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dsg.model.network.pixels import upright_rgb
from dsg.service.decode import decode_picture, pixels_of
from dsg.service.jpeg import jpeg_pixels
from dsg.service.problems import Problem

MAX_PIXELS = 1_000_000
MOST_SCANS = 64  # as docs/service.md says
SOS, EOI = b"\xff\xda", b"\xff\xd9"


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def noise(height: int, width: int, seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def by_turbo(data: bytes) -> np.ndarray | None:
    with Image.open(io.BytesIO(data)) as image:
        return jpeg_pixels(image, data)


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(upright_rgb(image))


@settings(deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 99),
    st.sampled_from(["RGB", "L"]),
    st.integers(1, 8),
    st.integers(1, 100),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.booleans(),
)
def test_pixels_are_those_of_pillow(
    height: int, width: int, seed: int, mode: str, orientation: int, quality: int, subsampling: str, progressive: bool
) -> None:
    image = noise(height, width, seed, mode)
    data = jpeg(image, orientation, quality=quality, subsampling=subsampling, progressive=progressive)
    found = by_turbo(data)
    assert found is not None and found.flags.c_contiguous and found.flags.writeable
    np.testing.assert_array_equal(found, by_pillow(data))


def test_a_file_without_a_colour_transform() -> None:
    data = jpeg(noise(16, 16, 0), keep_rgb=True, subsampling=0)
    found = by_turbo(data)
    assert found is not None
    np.testing.assert_array_equal(found, by_pillow(data))


def test_pillow_reads_what_is_not_plain() -> None:
    cmyk, png = io.BytesIO(), io.BytesIO()
    noise(8, 8, 0, "CMYK").save(cmyk, "JPEG")
    noise(8, 8, 0).save(png, "PNG")
    assert by_turbo(cmyk.getvalue()) is None
    assert by_turbo(png.getvalue()) is None


def test_pillow_has_the_say_over_unsound_files() -> None:
    data = jpeg(noise(64, 64, 0))
    scan = data.index(SOS)
    # Stray bytes before a marker: a warning of the library, and a picture for every viewer.
    stray = data[:scan] + b"\x00\x00" + data[scan:]
    assert by_turbo(stray) is None
    np.testing.assert_array_equal(decode_picture(stray, MAX_PIXELS), by_pillow(data))
    short = data[: len(data) // 2]
    assert by_turbo(short) is None
    with pytest.raises(Problem, match="cut short"):
        decode_picture(short, MAX_PIXELS)


def test_the_size_that_was_checked_is_the_size_that_is_decoded() -> None:
    small, large = jpeg(noise(8, 8, 0)), jpeg(noise(64, 64, 1))
    with Image.open(io.BytesIO(small)) as image:
        assert jpeg_pixels(image, large) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_picture_turns_it_upright(orientation: int) -> None:
    data = jpeg(noise(24, 40, orientation), orientation)
    np.testing.assert_array_equal(decode_picture(data, MAX_PIXELS), by_pillow(data))


def segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


def scans(count: int, mode: str = "L", size: int = 16) -> bytes:
    """A sound progressive JPEG of as many scans; one that refines a bit may come any number of times for libjpeg."""
    image = Image.new(mode, (size, size), 128 if mode == "L" else (0, 128, 128, 0))
    data = jpeg(image, progressive=True)
    starts = [at for at in range(len(data)) if data[at : at + 2] == SOS]
    assert data.endswith(EOI)
    return data[:-2] + data[starts[-1] : -2] * (count - len(starts)) + EOI


def problem(data: bytes) -> tuple[int, str]:
    with pytest.raises(Problem) as caught:
        decode_picture(data, MAX_PIXELS)
    return caught.value.status, caught.value.reason


@pytest.mark.parametrize("mode", ["L", "CMYK"])  # by libjpeg-turbo itself, by Pillow
def test_more_scans_than_any_encoder_writes_are_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most = scans(MOST_SCANS, mode)
    np.testing.assert_array_equal(decode_picture(most, MAX_PIXELS), by_pillow(scans(10 if mode == "L" else 20, mode)))
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("the file went to a decoder"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_: pytest.fail("the file went to a decoder"))
    assert problem(scans(MOST_SCANS + 1, mode)) == (415, "unsupported_pixels")
    assert pixels_of(scans(MOST_SCANS + 1, mode), MAX_PIXELS) == 0


def test_scans_of_a_multi_picture_file_count_too() -> None:
    file = io.BytesIO()
    noise(16, 16, 0).save(file, "MPO", save_all=True, append_images=[noise(16, 16, 1)])
    data = file.getvalue()
    directory = data[data.index(b"\xff\xe2") :]
    directory = directory[: 2 + int.from_bytes(directory[2:4], "big")]
    many = scans(MOST_SCANS + 1)
    assert problem(many[:2] + directory + many[2:]) == (415, "unsupported_pixels")


@pytest.mark.parametrize("code", [0xFE, 0xE1, 0xEF])
def test_scans_in_a_segment_are_content(code: int) -> None:
    """A thumbnail, a comment: whatever they hold, the picture around them is read, before and between scans."""
    hidden = scans(100)
    data = jpeg(noise(16, 16, 0), progressive=True)
    second = data.index(SOS, data.index(SOS) + 2)
    table = data.rindex(b"\xff\xc4", 0, second)
    for at in (2, table):
        inside = data[:at] + segment(code, hidden) + data[at:]
        np.testing.assert_array_equal(decode_picture(inside, MAX_PIXELS), by_pillow(data))


def test_an_end_in_a_segment_is_not_the_end() -> None:
    many = scans(MOST_SCANS + 1)
    assert problem(many[:2] + segment(0xFE, EOI) + many[2:]) == (415, "unsupported_pixels")
    last = many.rindex(SOS)
    assert problem(many[:last] + segment(0xFE, EOI + b"\xff\xd8") + many[last:]) == (415, "unsupported_pixels")


def test_what_follows_the_end_does_not_count() -> None:
    photo = jpeg(noise(16, 16, 0))
    film = (SOS + b"\0\2") * 1000
    np.testing.assert_array_equal(decode_picture(photo + film, MAX_PIXELS), by_pillow(photo))


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xff\xff"])
def test_scans_behind_filling_count(filling: bytes) -> None:
    many = scans(MOST_SCANS + 1).replace(SOS, filling + SOS)
    assert problem(many) == (415, "unsupported_pixels")


@pytest.mark.parametrize("code", [0x01, 0x02, 0xBF, 0xD0, 0xD7, 0xD8])
def test_a_marker_without_a_length_hides_no_scans(code: int) -> None:
    many = scans(MOST_SCANS + 1)
    second = many.index(SOS, many.index(SOS) + 2)
    length = b"\x7f\xfe"  # if it were one, the file would end in this segment
    hiding = many[:second] + bytes([0xFF, code]) + length + many[second:]
    assert problem(hiding) == (415, "unsupported_pixels")


@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_a_scan_is_found_wherever_it_lies(offset: int) -> None:
    """The data is searched in pieces of 128 KiB, so that other threads get their turn."""
    many = scans(MOST_SCANS + 1)
    last = many.rindex(SOS)
    before = many.rindex(SOS, 0, last)
    start = before + 2 + int.from_bytes(many[before + 2 : before + 4], "big")
    long = many[:last] + b"\x55" * (start + 131_072 + offset - last) + many[last:]
    assert problem(long) == (415, "unsupported_pixels")


def test_a_header_that_takes_long_to_walk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(noise(16, 16, 0))
    plain = by_pillow(data)
    # What metadata may be large for: the pieces of a long colour profile or of XMP.
    np.testing.assert_array_equal(
        decode_picture(data[:2] + segment(0xEF, b"x" * 100) * 1000 + data[2:], MAX_PIXELS), plain
    )
    np.testing.assert_array_equal(decode_picture(data[:2] + b"\xff" * 1000 + data[2:], MAX_PIXELS), plain)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("the file went to a decoder"))
    for between in (segment(0xEE, b"") * 3000, b"\xff" * 100_000, b"\0" * 100_000):
        assert problem(data[:2] + between + data[2:]) == (400, "broken_picture")
        assert problem(data[:20] + between + data[20:]) == (400, "broken_picture")


def test_a_walk_to_many_scans_is_no_long_way() -> None:
    few = jpeg(noise(16, 16, 0))
    many = few[:-2] + segment(0xEE, SOS) * 100_000 + EOI
    assert problem(many) == (400, "broken_picture")
