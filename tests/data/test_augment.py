"""AugmentConfig's checks, and what Augment draws."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dsg.model.data.transforms import Augment, AugmentConfig


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip is 1.5"),
        ({"vertical_flip": -0.1}, "vertical_flip is -0.1"),
        ({"quarter_turn": float("nan")}, "quarter_turn is nan"),
        ({"copy_paste": 2.0}, "copy_paste is 2"),
        ({"min_visible": -1.0}, "min_visible is -1"),
        ({"color_jitter": 3.0}, "color_jitter is 3"),
        ({"brightness": 1.1}, "brightness is 1.1"),
        ({"hue": 0.6}, "hue is 0.6; it must lie in 0 to 0.5"),
        ({"short_sides": (0,)}, r"short_sides is \[0\]"),
        ({"short_side_range": True}, r"needs two augment.short_sides, got \[800\]"),
        ({"long_side": 700}, "long_side = 700 is below the largest of augment.short_sides"),
        ({"crop_size": -1}, "crop_size is -1"),
        ({"crop_size": 100, "scale_range": (0.0, 1.0)}, "scale_range is"),
        ({"crop_size": 100, "scale_range": (2.0, 1.0)}, "scale_range is"),
        ({"scale_range": (1.0, float("inf"))}, "scale_range is"),
        ({"min_side": 0.0}, "min_side is 0"),
    ],
)
def test_config_refuses(fields, told):
    with pytest.raises(ValueError, match=told) as caught:
        AugmentConfig(**fields)
    assert str(caught.value).startswith("augment.")


def test_config_takes_a_short_long_side_with_a_crop():
    assert AugmentConfig(crop_size=64, long_side=10).same_shape
    assert not AugmentConfig().same_shape


def drawn(config: AugmentConfig, size: tuple[int, int], count: int = 200):
    augment = Augment(config)
    return [augment.draw_view(size, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("size", "resized"), [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1000), (400, 1333))]
)
def test_short_and_long_side_as_in_the_paper(size, resized):
    for view in drawn(AugmentConfig(), size, 5):
        assert view.resized == view.window[2:] == resized and view.canvas is None


def test_short_side_from_a_list_or_a_range():
    listed = drawn(AugmentConfig(short_sides=(64, 80, 96), long_side=200), (100, 120))
    assert {view.resized[0] for view in listed} == {64, 80, 96}
    ranged = drawn(AugmentConfig(short_sides=(80, 64), short_side_range=True, long_side=200), (100, 120))
    assert {view.resized[0] for view in ranged} == set(range(64, 81))
    kept = drawn(AugmentConfig(short_sides=()), (100, 120), 3)
    assert {view.resized for view in kept} == {(100, 120)}


def test_jitter_covers_its_range_and_cuts_to_the_square():
    views = drawn(AugmentConfig(crop_size=64, scale_range=(0.5, 2.0)), (100, 50), 400)
    long_sides = [view.resized[0] for view in views]
    assert 32 <= min(long_sides) < 36 and 122 < max(long_sides) <= 128
    for view in views:
        assert abs(view.resized[1] - view.resized[0] / 2) <= 1
        top, left, height, width = view.window
        assert (height, width) == (min(64, view.resized[0]), min(64, view.resized[1]))
        assert 0 <= top <= view.resized[0] - height and 0 <= left <= view.resized[1] - width
        assert view.size == (64, 64)
    large = [view for view in views if view.resized[0] > 100]
    assert len({view.window[0] for view in large}) > 15


def test_a_tiny_scale_leaves_a_pixel():
    (view,) = drawn(AugmentConfig(crop_size=8, scale_range=(0.01, 0.01)), (10, 400), 1)
    assert view.resized == (1, 1)


def test_flips_and_turns_come_as_often_as_asked():
    views = drawn(AugmentConfig(horizontal_flip=0.25, vertical_flip=1.0, quarter_turn=0.5), (10, 10), 600)
    assert 0.18 < np.mean([view.flip_x for view in views]) < 0.32
    assert all(view.flip_y for view in views)
    turns = np.bincount([view.quarter_turns for view in views], minlength=4) / 600
    assert 0.43 < turns[0] < 0.57 and (turns[1:] > 0.11).all()
    plain = drawn(AugmentConfig(horizontal_flip=0.0), (10, 10))
    assert not any(view.flip_x or view.flip_y or view.quarter_turns for view in plain)


def test_the_same_generator_draws_the_same():
    config = AugmentConfig(crop_size=64, quarter_turn=0.5)
    assert drawn(config, (30, 40), 20) == drawn(config, (30, 40), 20)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 12, 15), dtype=np.uint8))


def test_no_colour_change_unless_asked(image):
    assert Augment(AugmentConfig()).change_colors(image, np.random.default_rng(0)) is image


@pytest.mark.parametrize(
    ("name", "reference"),
    [("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Saturation"), ("hue", "Hue")],
)
def test_each_colour_change_stays_between_its_extremes(image, name, reference):
    """Against torchvision's own ColorJitter held at the ends of the range."""
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = AugmentConfig(color_jitter=1.0, **{**off, name: 0.3})
    found = [Augment(config).change_colors(image, np.random.default_rng(seed)) for seed in range(20)]
    assert len({tuple(one.flatten().tolist()) for one in found}) > 10
    assert all(one.dtype == torch.uint8 and one.shape == image.shape for one in found)
    if name == "hue":
        for one in found:  # turning the hue keeps the largest channel's value
            assert (one.amax(0).int() - image.amax(0).int()).abs().max() <= 1
        return
    ends = [v2.ColorJitter(**{name: (factor, factor)})(image) for factor in (0.7, 1.3)]
    low, high = torch.minimum(*ends).int(), torch.maximum(*ends).int()
    for one in found:
        assert (one.int() >= low - 1).all() and (one.int() <= high + 1).all()


def test_colour_changes_come_as_often_as_asked(image):
    config = AugmentConfig(color_jitter=0.25, contrast=0.0, saturation=0.0)
    augment = Augment(config)
    changed = [augment.change_colors(image, np.random.default_rng(seed)) is not image for seed in range(400)]
    assert 0.18 < np.mean(changed) < 0.32
