"""Picture files as RGB: modes, EXIF orientation, and the line for what cannot be used."""

import numpy as np
import pytest
from PIL import Image

from dsg.model.data.coco import DataError
from dsg.model.data.pixels import read_picture

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def saved(tmp_path, picture: Image.Image, name="a.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def pixels(path, size=(4, 6)) -> np.ndarray:
    picture = read_picture(path, size)
    assert picture.mode == "RGB"
    return np.array(picture)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def test_rgb_as_it_is(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(values))), values)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled_by_its_range(tmp_path, name):
    values = np.array([[0, 128, 257, 32767, 32768, 65535]] * 4, np.uint16)
    result = pixels(saved(tmp_path, Image.fromarray(values), name))
    np.testing.assert_array_equal(result, grey(np.round(values / 257).astype(np.uint8)))


@pytest.mark.parametrize("mode", ["L", "P", "LA"])
def test_grey_and_palette(tmp_path, mode):
    path = saved(tmp_path, Image.fromarray(RAMP).convert(mode))
    np.testing.assert_array_equal(pixels(path), grey(RAMP))


def test_black_and_white(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP > 100))
    np.testing.assert_array_equal(pixels(path), grey((RAMP > 100) * np.uint8(255)))


def test_cmyk(tmp_path):
    picture = Image.new("CMYK", (6, 4), (0, 255, 255, 0))  # no cyan: red
    np.testing.assert_allclose(pixels(saved(tmp_path, picture, "a.jpg"))[0, 0], [255, 0, 0], atol=3)


def test_transparency_is_composed_on_white(tmp_path):
    picture = Image.new("RGBA", (6, 4), (200, 0, 0, 0))
    picture.putpixel((0, 0), (100, 50, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 51))
    result = pixels(saved(tmp_path, picture))
    assert result[0, 0].tolist() == [100, 50, 0]
    assert result[0, 1].tolist() == [204, 204, 204]
    assert result[3, 5].tolist() == [255, 255, 255]


def test_a_transparent_palette_entry(tmp_path):
    picture = Image.new("P", (6, 4), 1)
    picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.putpixel((0, 0), 0)
    result = pixels(saved(tmp_path, picture, transparency=0))
    assert result[0, 0].tolist() == [255] * 3 and result[1, 1].tolist() == [9] * 3


# What a viewer must do for each tag, by its definition: where row 0 and column 0 of the file belong.
UPRIGHT = {
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_orientation_is_followed_only_where_the_annotations_do(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(grey(RAMP)), exif=exif)
    np.testing.assert_array_equal(pixels(path, (4, 6)), grey(RAMP))
    np.testing.assert_array_equal(pixels(path, (6, 4)), UPRIGHT[orientation](grey(RAMP)))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_orientations_that_swap_no_sides_are_not_followed(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(grey(RAMP)), exif=exif)
    np.testing.assert_array_equal(pixels(path), grey(RAMP))
    with pytest.raises(DataError, match=r"is 4 x 6 \(height x width\), its annotations say 6 x 4"):
        read_picture(path, (6, 4))


def test_what_cannot_be_used_is_named(tmp_path):
    cases = {
        "no such picture": tmp_path / "none.png",
        "annotations say 5 x 6": saved(tmp_path, Image.new("L", (6, 4)), "small.png"),
        "no known range": saved(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "float.tif"),
        "has 2 pages": saved(
            tmp_path, Image.new("L", (6, 5)), "2.tif", save_all=True, append_images=[Image.new("L", (6, 5))]
        ),
    }
    whole = saved(tmp_path, Image.effect_noise((60, 50), 50), "cut.jpg")
    whole.write_bytes(whole.read_bytes()[:-600])
    cases["cannot be decoded"] = whole
    text = tmp_path / "text.png"
    text.write_text("hello")
    cases["decoded"] = text
    for told, path in cases.items():
        with pytest.raises(DataError, match=told) as caught:
            read_picture(path, (50, 60) if path == whole else (5, 6))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_integers_of_32_bits_have_no_known_range(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP.astype(np.int32)), "a.tif")
    with pytest.raises(DataError, match="no known range"):
        read_picture(path, (4, 6))
