"""Views: one map for points, boxes, masks and pixels, held against numpy and Pillow step by step."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dsg.model.data.masks import Patch, decode_mask
from dsg.model.data.records import Annotation
from dsg.model.data.sample import make_sample
from dsg.model.data.view import View

# Slow machines are no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def views(draw: st.DrawFn, *, resize: bool = True, cut: bool = True) -> View:
    source = draw(st.tuples(st.integers(3, 40), st.integers(3, 40)))
    resized = draw(st.tuples(st.integers(2, 60), st.integers(2, 60))) if resize else source
    height = draw(st.integers(1, resized[0])) if cut else resized[0]
    width = draw(st.integers(1, resized[1])) if cut else resized[1]
    top, left = draw(st.integers(0, resized[0] - height)), draw(st.integers(0, resized[1] - width))
    flips = draw(st.tuples(st.booleans(), st.booleans()))
    return View(source, resized, (top, left, height, width), *flips, draw(st.integers(0, 3)))


def step_by_step(array: np.ndarray, view: View) -> np.ndarray:
    """What happens to an array [H, W, ...] in the resized frame."""
    top, left, height, width = view.window
    array = array[top : top + height, left : left + width]
    if view.flip_x:
        array = array[:, ::-1]
    if view.flip_y:
        array = array[::-1]
    return np.rot90(array, view.quarter_turns)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


@unhurried
@given(views(resize=False))
def test_pixels_without_resize_are_exact(view):
    picture = noise(view.source)
    pixels = view.map_picture(picture)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), step_by_step(np.array(picture), view))


@unhurried
@given(views())
def test_pixels_equal_those_of_the_whole_picture_resized(view):
    picture = noise(view.source)
    whole = picture.resize(view.resized[::-1], Image.Resampling.BILINEAR)
    expected = step_by_step(np.array(whole), view).astype(int)
    found = view.map_picture(picture).permute(1, 2, 0).numpy()
    assert found.shape == expected.shape == (*view.shown, 3)
    # Pillow rounds its weights for a part and for the whole a little differently.
    assert np.abs(found - expected).max() <= 2


@unhurried
@given(views(), st.integers(0, 2**31))
def test_masks_take_the_nearest_source_pixel(view, seed):
    mask = (np.random.default_rng(seed).random(view.source) < 0.4).astype(np.uint8)
    rows, columns = (
        [math.floor((i + Fraction(1, 2)) * source / resized) for i in range(resized)]
        for source, resized in zip(view.source, view.resized, strict=True)
    )
    expected = step_by_step(mask[np.ix_(rows, columns)], view)
    found = np.zeros(view.shown, np.uint8)
    view.map_patch(Patch(mask, 0, 0)).write(found)
    np.testing.assert_array_equal(found, expected)
    # A part of the mask, as RLE gives it, comes to lie in the same place.
    part = mask.copy()
    part[:1], part[:, :2], part[:, -1:] = 0, 0, 0
    found[:] = 0
    view.map_patch(Patch(mask[1:, 2:-1], 1, 2)).write(found)
    np.testing.assert_array_equal(found, step_by_step(part[np.ix_(rows, columns)], view))


@unhurried
@given(views(), st.data())
def test_points_land_where_their_pixel_does(view, data):
    """The centre of a marked resized pixel is mapped to the centre of the pixel where the mark ends up."""
    top, left, height, width = view.window
    y, x = top + data.draw(st.integers(0, height - 1)), left + data.draw(st.integers(0, width - 1))
    mark = np.zeros(view.resized, bool)
    mark[y, x] = True
    ((row, column),) = np.argwhere(step_by_step(mark, view))
    scale = np.array([view.source[1] / view.resized[1], view.source[0] / view.resized[0]])
    mapped = view.map_points((np.array([[x, y]]) + 0.5) * scale)
    np.testing.assert_allclose(mapped, [[column + 0.5, row + 0.5]], atol=1e-9)


@unhurried
@given(views())
def test_the_sample_shows_just_the_window(view):
    scale_y, scale_x = view.source[0] / view.resized[0], view.source[1] / view.resized[1]
    top, left, height, width = view.window
    box = np.array([[left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y]])
    np.testing.assert_allclose(view.map_boxes(box), [[0, 0, view.shown[1], view.shown[0]]], atol=1e-9)


@pytest.mark.parametrize("kind", ["flip_x", "flip_y", "turns"])
@unhurried
@given(views(resize=False, cut=False), st.integers(0, 2**31))
def test_undone_by_doing_it_again(kind, view, seed):
    rng = np.random.default_rng(seed)
    size = view.source
    if kind == "turns":
        once = View(size, size, (0, 0, *size), quarter_turns=1)
        back = View(size[::-1], size[::-1], (0, 0, *size[::-1]), quarter_turns=3)
    else:
        once = back = View(size, size, (0, 0, *size), **{kind: True})
    picture = noise(size)
    boxes = np.sort(rng.random((4, 2, 2)) * 9, axis=1).reshape(4, 4)
    mask = (rng.random(size) < 0.5).astype(np.uint8)
    moved = Image.fromarray(once.map_picture(picture).permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(back.map_picture(moved).permute(1, 2, 0).numpy(), np.array(picture))
    np.testing.assert_allclose(back.map_boxes(once.map_boxes(boxes)), boxes, atol=1e-9)
    np.testing.assert_array_equal(back.map_patch(once.map_patch(Patch(mask, 0, 0))).pixels, mask)


def test_padding_is_right_and_below_in_the_mean_colour():
    view = View((4, 6), (4, 6), (0, 0, 4, 6), quarter_turns=1, canvas=(8, 8))
    assert view.shown == (6, 4) and view.size == (8, 8)
    pixels = view.map_picture(Image.new("RGB", (6, 4), (1, 2, 3)))
    assert (pixels[:, :6, :4] == torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]).all()
    for part in (pixels[:, 6:, :], pixels[:, :, 4:]):
        assert (part == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]).all()


@st.composite
def squares(draw: st.DrawFn, size: tuple[int, int]) -> Annotation:
    """A square of whole pixels inside the picture, as polygon or RLE."""
    side = draw(st.integers(1, min(size)))
    x, y = draw(st.integers(0, size[1] - side)), draw(st.integers(0, size[0] - side))
    polygon = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    segmentation: list | dict = [[float(value) for value in polygon[0]]]
    if draw(st.booleans()):
        runs, value = [0], 0
        for pixel in decode_mask(segmentation, *size).T.ravel().tolist():
            if pixel != value:
                runs.append(0)
                value = pixel
            runs[-1] += 1
        segmentation = {"size": list(size), "counts": runs}
    return Annotation((x, y, x + side, y + side), 1, segmentation, False, 1)


@unhurried
@given(views(), st.data())
def test_boxes_and_masks_of_a_sample_agree(view, data):
    objects = [data.draw(squares(view.source)) for _ in range(3)]
    _, target = make_sample(noise(view.source), objects, 5, view, min_visible=0.2, min_side=1.0)
    assert target["masks"].shape == (len(target["boxes"]), *view.size)
    for box, mask, has_mask in zip(target["boxes"], target["masks"], target["has_mask"], strict=True):
        x1, y1, x2, y2 = box.tolist()
        assert 0 <= x1 < x2 <= view.size[1] and 0 <= y1 < y2 <= view.size[0]
        assert min(x2 - x1, y2 - y1) >= 1 - 1e-4
        assert has_mask == mask.any()
        if has_mask:
            rows, columns = np.flatnonzero(mask.any(dim=1)), np.flatnonzero(mask.any(dim=0))
            tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(tight - box.numpy()).max() <= 1.001
            # A square: the area of the mask is the area of the box, up to a pixel all around.
            area, edge = (x2 - x1) * (y2 - y1), 2 * (x2 - x1 + y2 - y1) + 4
            assert abs(int(mask.sum()) - area) <= edge


@unhurried
@given(st.integers(20, 60), st.integers(20, 60), st.floats(0.5, 3), st.data())
def test_area_grows_with_the_square_of_the_scale(height, width, scale, data):
    size = (height, width)
    resized = (round(height * scale), round(width * scale))
    one = data.draw(squares(size))
    _, target = make_sample(noise(size), [one], 5, View(size, resized, (0, 0, *resized)))
    side = one.box[2] - one.box[0]
    expected = side**2 * (resized[0] / height) * (resized[1] / width)
    perimeter = 4 * side * scale
    assert abs(int(target["masks"].sum()) - expected) <= 0.5 * perimeter + 4


TRIANGLE = Annotation((0.0, 0.0, 19.8, 19.8), 1, [[0, 0, 19.8, 0, 0, 19.8]], False, 1)


def shown(window: tuple[int, int, int, int], min_side: float = 1.0) -> dict:
    """The target of a triangle that fills the upper left half of its box."""
    return make_sample(noise((20, 20)), [TRIANGLE], 1, View((20, 20), (20, 20), window), 0.1, min_side)[1]


def test_a_box_that_is_not_cut_stays_finer_than_pixels():
    assert shown((0, 0, 20, 20))["boxes"].tolist() == [pytest.approx([0, 0, 19.8, 19.8])]


def test_a_cut_box_fits_what_is_left_of_the_mask():
    target = shown((0, 10, 20, 10))
    rows, columns = np.nonzero(decode_mask(TRIANGLE.segmentation, 20, 20)[:, 10:])
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert target["boxes"].tolist() == [expected] and expected[3] < 12
    assert target["masks"].sum() == len(rows)


def test_an_object_is_dropped_where_only_the_empty_part_of_its_box_is_in_view():
    assert len(shown((10, 10, 10, 10))["boxes"]) == 0
    assert len(shown((6, 6, 10, 10))["boxes"]) == 1
    assert len(shown((6, 6, 10, 10), min_side=9.0)["boxes"]) == 0
