"""JPEG files by libjpeg-turbo: pixel for pixel what Pillow reads, and Pillow's where a file is not sound."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dsg.model.network.pixels import upright_rgb
from dsg.service.decode import decode_picture
from dsg.service.jpeg import jpeg_pixels
from dsg.service.problems import Problem

MAX_PIXELS = 1_000_000


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
    scan = data.index(b"\xff\xda")
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
