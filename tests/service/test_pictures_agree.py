"""A picture is the same pixels whichever way it comes in: a path for the Predictor, training data, an upload."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from service_fakes import encoded
from torch import nn

from dsg.model.data.pixels import read_picture
from dsg.model.data.records import DataError
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize
from dsg.model.network.predictor import Predictor
from dsg.service.decode import decode_picture
from dsg.service.problems import Problem

HEIGHT, WIDTH = 4, 6
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SIXTEEN = np.array([[0, 128, 129, 32896, 65407, 65535]] * HEIGHT, np.uint16)


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(RGB), kind, exif=exif)


def with_alpha(mode: str) -> Image.Image:
    alpha = Image.fromarray(RGB[..., 0])
    image = Image.fromarray(RGB).convert(mode)
    image.putalpha(alpha)
    return image


def palette() -> Image.Image:
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, 9, 90, 200])
    image.putpixel((0, 0), 0)
    return image


def tiff_grey(values: bytes, bits: int, photometric: int) -> bytes:
    """A little-endian, uncompressed TIFF of one strip."""
    entries = [(256, 4, WIDTH), (257, 4, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, HEIGHT), (279, 4, len(values))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory + struct.pack("<I", 0)


def phone_photo() -> bytes:
    second = Image.new("RGB", (WIDTH, HEIGHT))
    return encoded(Image.fromarray(RGB), "MPO", save_all=True, append_images=[second])


ODD: dict[str, Callable[[], bytes]] = {
    **{f"{kind} turned {n}": lambda kind=kind, n=n: turned(kind, n) for kind in ("JPEG", "TIFF") for n in range(2, 9)},
    "16-bit PNG": lambda: encoded(Image.fromarray(SIXTEEN), "PNG"),
    "16-bit TIFF": lambda: encoded(Image.fromarray(SIXTEEN), "TIFF"),
    "inverted 16-bit TIFF": lambda: tiff_grey(SIXTEEN.tobytes(), 16, 0),
    "12-bit TIFF": lambda: tiff_grey(bytes([0x00, 0x0F, 0xFF, 0x80, 0x01, 0x23, 0x45, 0x67, 0x89]) * HEIGHT, 12, 1),
    "RGBA": lambda: encoded(with_alpha("RGB"), "PNG"),
    "grey with alpha": lambda: encoded(with_alpha("L"), "PNG"),
    "palette": lambda: encoded(palette(), "PNG"),
    "palette with a transparent entry": lambda: encoded(palette(), "PNG", transparency=0),
    "black and white": lambda: encoded(Image.fromarray(RGB[..., 0] > 100), "PNG"),
    "CMYK JPEG": lambda: encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "CMYK TIFF": lambda: encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "MPO": phone_photo,
    "broken EXIF": lambda: encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}

REFUSED: dict[str, Callable[[], bytes]] = {
    "two pages": lambda: encoded(
        Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]
    ),
    "floats": lambda: encoded(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"),
    "32 bits": lambda: encoded(Image.fromarray(RGB[..., 0].astype(np.int32)), "TIFF"),
    "CIE L*a*b*": lambda: encoded(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF"),
    "cut short": lambda: encoded(Image.fromarray(RGB), "PNG")[:70],
    "text": lambda: b"hello",
}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Keeps the size of what it prepares; its network is never run."""
    size = Resize(min(HEIGHT, WIDTH), max(HEIGHT, WIDTH))
    return Predictor(nn.Linear(1, 1), CheckpointInfo("none", "none", {}, (Category(1, "thing"),), size, 0.5))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ODD)
def test_all_ways_agree(name: str, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(ODD[name]())
    uploaded = decode_picture(path.read_bytes(), 1000)
    prepared = predictor.prepare(path).pixels.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(prepared, uploaded)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(predictor.prepare(opened).pixels.permute(1, 2, 0).numpy(), uploaded)
    if name.endswith(("turned 2", "turned 3", "turned 4")):
        return  # training data follow no tag that swaps no sides
    np.testing.assert_array_equal(np.array(read_picture(path, uploaded.shape[:2])), uploaded)


@pytest.mark.parametrize("name", REFUSED)
def test_all_ways_refuse(name: str, predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(REFUSED[name]())
    with pytest.raises(Problem):
        decode_picture(path.read_bytes(), 1000)
    with pytest.raises(DataError) as from_data:
        read_picture(path, (HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=r"^cannot read") as from_predictor:
        predictor.prepare(path)
    for caught in (from_data, from_predictor):
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_data_as_stored(kind: str, orientation: int, tmp_path: Path) -> None:
    """Where the annotations count stored pixels, the tag changes nothing, in a type that Pillow turns by itself too."""
    path = tmp_path / "picture"
    path.write_bytes(turned(kind, orientation))
    plain = tmp_path / "plain"
    plain.write_bytes(encoded(Image.fromarray(RGB), kind))
    pixels = np.array(read_picture(path, (HEIGHT, WIDTH)))
    np.testing.assert_array_equal(pixels, np.array(read_picture(plain, (HEIGHT, WIDTH))))
    if kind != "JPEG":
        np.testing.assert_array_equal(pixels, RGB)
