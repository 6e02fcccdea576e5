"""Bytes of files to pixels: every mode, every orientation, and everything that must be refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from service_fakes import encoded, picture

from dsg.service.decode import decode_picture
from dsg.service.problems import Problem

MAX_PIXELS = 64_000_000
KINDS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF"]


def decode(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    return decode_picture(encoded(image, kind, **options), MAX_PIXELS)


def refused(data: bytes, max_pixels: int = MAX_PIXELS) -> Problem:
    with pytest.raises(Problem) as caught:
        decode_picture(data, max_pixels)
    return caught.value


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG by hand, for what Pillow does not write; `extra` goes before the pixels."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("kind", KINDS)
def test_rgb_comes_through(kind: str) -> None:
    image = picture((20, 10, 60, 40))
    lossy = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(image, kind, **lossy)
    assert pixels.shape == (64, 96, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels.astype(int), np.array(image).astype(int), atol=12 if kind == "JPEG" else 0)


# Where the four corners of a stored picture go, for each orientation: what the EXIF standard says.
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, ["ab", "cd"]),
        (2, ["ba", "dc"]),
        (3, ["dc", "ba"]),
        (4, ["cd", "ab"]),
        (5, ["ac", "bd"]),
        (6, ["ca", "db"]),
        (7, ["db", "ca"]),
        (8, ["bd", "ac"]),
    ],
)
def test_all_orientations(kind: str, orientation: int, upright: list[str]) -> None:
    greys = {"a": 0, "b": 80, "c": 160, "d": 240}
    stored = np.kron([[0, 80], [160, 240]], np.ones((16, 32))).astype(np.uint8)  # [32, 64]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(Image.fromarray(stored), kind, exif=exif, **lossless)
    assert pixels.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
    height, width = pixels.shape[:2]
    corners = pixels[height // 4 :: height // 2, width // 4 :: width // 2, 0]  # [2, 2]
    np.testing.assert_allclose(corners, [[greys[name] for name in row] for row in upright], atol=3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as `serve` does
@pytest.mark.parametrize("exif", [b"", b"II*\0\xff\xff\xff\xff", b"nonsense of some length"])
def test_broken_exif_does_not_spoil_a_sound_picture(exif: bytes) -> None:
    assert decode(picture(), "JPEG", exif=b"Exif\0\0" + exif).shape == (64, 96, 3)


def test_unknown_orientation_is_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    assert decode(picture(), "JPEG", exif=exif).shape == (64, 96, 3)


def test_grey_and_bilevel() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode(Image.fromarray(ramp)), np.dstack([ramp] * 3))
    bits = Image.fromarray(ramp > 100)
    assert bits.mode == "1"
    np.testing.assert_array_equal(decode(bits)[..., 1], np.where(ramp > 100, 255, 0))


def test_transparency_is_composed_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 51))  # a fifth: 0.2 * 200 + 0.8 * 255 = 244, 0.8 * 255 = 204
    assert decode(rgba).tolist() == [[[200, 0, 0], [244, 204, 204]]]
    assert decode(rgba, "TIFF").tolist() == [[[200, 0, 0], [244, 204, 204]]]
    assert decode(rgba, "WEBP", lossless=True, exact=True).tolist() == [[[200, 0, 0], [244, 204, 204]]]
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (100, 0))
    assert decode(grey)[0, :, 0].tolist() == [100, 255]


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for x in range(3):
        image.putpixel((x, 0), x)
    assert decode(image).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert decode(image, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    # half a palette entry: (40 + 255) / 2 and so on
    partly = decode(image, transparency=bytes([255, 128, 255]))
    np.testing.assert_allclose(partly[0, 1], [147, 152, 157], atol=1)


def test_one_transparent_colour_of_rgb_and_grey() -> None:
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (4, 5, 6))
    assert decode(rgb, transparency=(4, 5, 6)).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    grey = Image.new("L", (2, 1), 9)
    grey.putpixel((1, 0), 8)
    assert decode(grey, transparency=8)[0, :, 0].tolist() == [9, 255]


def test_cmyk_is_converted() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        np.testing.assert_allclose(decode(ink, kind)[4, 4], (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    assert decode(image, kind)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_sixteen_bit_rgb_keeps_its_high_byte() -> None:
    rows = b"\0" + struct.pack(">6H", 0, 32896, 65535, 257, 514, 771)
    pixels = decode_picture(png(2, 1, bits=16, colour=2, rows=rows), MAX_PIXELS)
    assert pixels.tolist() == [[[0, 128, 255], [1, 2, 3]]]


def tiff_grey(values: bytes, width: int, bits: int, photometric: int) -> bytes:
    """One row of a little-endian, uncompressed TIFF."""
    entries = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, 1), (279, 4, len(values))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory + struct.pack("<I", 0)


def test_twelve_bit_and_inverted_tiff() -> None:
    twelve = tiff_grey(bytes([0x00, 0x0F, 0xFF]), 2, 12, 1)  # 0x000, 0xfff
    assert decode_picture(twelve, MAX_PIXELS)[0, :, 0].tolist() == [0, 255]
    white_is_zero = tiff_grey(struct.pack("<2H", 0, 65535), 2, 16, 0)
    assert decode_picture(white_is_zero, MAX_PIXELS)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_float_and_32_bit_pixels_are_refused(mode: str) -> None:
    problem = refused(encoded(Image.new(mode, (4, 4)), "TIFF"))
    assert (problem.status, problem.reason) == (415, "unsupported_pixels")


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_several_frames_are_refused(kind: str) -> None:
    frames = [picture(), picture((0, 0, 9, 9))]
    problem = refused(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert (problem.status, problem.reason) == (415, "several_frames")


def test_of_many_pages_no_more_than_the_first_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.new("L", (4, 4), grey) for grey in range(100)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    read = []
    load = TiffImagePlugin.ImageFileDirectory_v2.load
    monkeypatch.setattr(
        TiffImagePlugin.ImageFileDirectory_v2, "load", lambda self, file: read.append(file.tell()) or load(self, file)
    )
    problem = refused(data)
    assert (problem.status, problem.reason) == (415, "several_frames")
    assert len(set(read)) == 1, "more pages were read"


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "MPO"])
def test_a_file_of_one_frame_saved_as_several_is_a_picture(kind: str) -> None:
    assert decode(picture(), kind, save_all=True).shape == (64, 96, 3)


def test_a_phones_depth_map_is_not_a_second_picture() -> None:
    data = encoded(picture((20, 10, 60, 40)), "MPO", save_all=True, append_images=[picture()], quality=95)
    assert data[:2] == b"\xff\xd8"
    pixels = decode_picture(data, MAX_PIXELS)
    assert pixels[25, 40, 0] > 240 and pixels[25, 40, 1] < 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    problem = refused(data[: int(len(data) * share)])
    assert problem.status == 400, problem.detail


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}])
def test_truncated_jpeg_of_other_kinds(options: dict) -> None:
    data = encoded(picture((20, 10, 60, 40)), "JPEG", **options)
    assert refused(data[: len(data) // 2]).status == 400


def test_what_is_no_picture_is_told_from_what_is_not_taken() -> None:
    assert (refused(b"").status, refused(b"").reason) == (400, "empty_picture")
    assert refused(b"hello, world").status == 400
    assert refused(b"\x89PNG\r\n\x1a\n").status == 400
    gif = encoded(picture().convert("P"), "GIF")
    assert (refused(gif).status, refused(gif).reason) == (415, "unsupported_type")
    assert "GIF" in refused(gif).detail
    for data in (b"%PDF-1.7\n", b"\0\0\0\x18ftypheic\0\0", b"8BPS\0\1"):
        assert refused(data).status == 415


def bombs() -> dict[str, bytes]:
    """Files of a few bytes whose headers promise 50,000 x 50,000 pixels (WebP: as many as fit)."""
    bmp = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 50_000, 50_000)
    webp = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    start = webp.index(b"\x2f")
    webp[start + 1 : start + 5] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    tiff = tiff_grey(b"\0" * 9, 50_000, 8, 1)
    at = tiff.index(struct.pack("<HHI", 257, 4, 1)) + 8
    tiff = tiff[:at] + struct.pack("<I", 50_000) + tiff[at + 4 :]
    return {
        "PNG": png(50_000, 50_000, rows=b"\0" * 100),
        "BMP": bytes(bmp),
        "JPEG": bytes(jpeg),
        "WEBP": bytes(webp),
        "TIFF": tiff,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_bombs_are_known_by_their_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        pytest.fail("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    problem = refused(bombs()[kind])
    assert (problem.status, problem.reason) == (413, "too_many_pixels")


def test_the_pixel_cap_is_exact() -> None:
    data = encoded(picture())
    assert decode_picture(data, 96 * 64).shape == (64, 96, 3)
    assert refused(data, 96 * 64 - 1).status == 413


def test_between_our_cap_and_pillows() -> None:
    assert refused(png(10_000, 10_000, rows=b"\0" * 100)).status == 413  # where Pillow would only warn


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 100_000_000, 9))
    rows = b"\0\0"
    assert refused(png(1, 1, rows=rows, extra=text)).status == 400


@settings(deadline=None)
@given(st.data())
def test_no_damage_gets_past_problem(data) -> None:
    """Bytes changed at random in a file of each type: pixels or a problem, never another exception."""
    kind = data.draw(st.sampled_from(KINDS))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind == "BMP" else {"exif": exif}
    damaged = bytearray(encoded(picture((2, 3, 9, 9), size=(16, 12)), kind, **options))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_picture(bytes(damaged), 1_000_000)
    except Problem as problem:
        assert problem.status in (400, 413, 415)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_pixels_are_not_shared_with_a_buffer() -> None:
    pixels = decode_picture(io.BytesIO(encoded(picture())).getvalue(), MAX_PIXELS)
    pixels[0, 0] = 1  # writable
