"""CocoDataset: targets by hand, randomness by key, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from dsg.model.data.coco import DataError, read_coco
from dsg.model.data.dataset import CocoDataset, SampleKey, collate
from dsg.model.data.transforms import Augment, AugmentConfig


def flat(sample):
    """All of a sample as bytes, to compare two."""
    image, target = sample
    return image.numpy().tobytes(), {
        key: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for key, value in target.items()
    }


@pytest.fixture
def path(make_coco, square):
    return make_coco(
        [(20, 30), (24, 16), (9, 9)],
        [
            {"segmentation": [square(2, 3, 6)], "bbox": [2, 3, 6, 6], "category_id": 2},
            {"segmentation": [], "bbox": [10, 10, 5, 4], "category_id": 90},
            {"segmentation": [square(12, 0, 18)], "bbox": [12, 0, 18, 18], "iscrowd": 1},
            {"image_id": 2, "segmentation": [square(1, 1, 12)]},
        ],
    )


def test_targets_by_hand(path):
    dataset = CocoDataset(read_coco(path))
    image, target = dataset[0]
    expected = np.array(Image.open(path.parent / "images" / "0.png"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert image.dtype == torch.uint8
    assert target["boxes"].dtype == torch.float32 and target["ignore_boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64 and target["masks"].dtype == torch.uint8
    assert target["boxes"].tolist() == [[2, 3, 8, 9], [10, 10, 15, 14]]
    assert target["labels"].tolist() == [2, 3]
    assert target["has_mask"].tolist() == [True, False]
    assert target["ignore_boxes"].tolist() == [[12, 0, 30, 18]]
    assert target["image_id"] == 1
    mask = np.zeros((20, 30))
    mask[3:9, 2:8] = 1
    np.testing.assert_array_equal(target["masks"][0].numpy(), mask)
    assert not target["masks"][1].any()


def test_a_picture_without_objects(path):
    _, target = CocoDataset(read_coco(path))[2]
    shapes = {key: tuple(value.shape) for key, value in target.items() if key != "image_id"}
    assert shapes == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 9, 9),
        "has_mask": (0,),
        "ignore_boxes": (0, 4),
    }
    assert target["has_mask"].dtype == torch.bool and target["labels"].dtype == torch.int64


def test_a_mask_too_thin_for_any_pixel_is_a_box_only(make_coco):
    path = make_coco([(20, 30)], [{"segmentation": [[2, 3.1, 8, 3.1, 8, 3.2, 2, 3.2]]}])
    _, target = CocoDataset(read_coco(path))[0]
    assert target["has_mask"].tolist() == [False] and len(target["boxes"]) == 1


VARIED = AugmentConfig(crop_size=32, scale_range=(0.5, 2.0), color_jitter=0.5, copy_paste=0.5, quarter_turn=0.5)


def test_a_sample_depends_on_seed_and_key_alone(path):
    data = read_coco(path)
    one, other = (CocoDataset(data, Augment(VARIED), seed=3) for _ in range(2))
    keys = [SampleKey(index, epoch, lap) for index in range(3) for epoch in range(3) for lap in range(2)]
    expected = {key: flat(one[key]) for key in keys}
    for key in reversed(keys):
        assert flat(other[key]) == expected[key]
    assert flat(one[2]) == expected[SampleKey(2, 0, 0)]
    assert len({image for image, _ in expected.values()}) == len(keys)
    third = CocoDataset(data, Augment(VARIED), seed=4)
    assert flat(third[0]) != flat(one[0])


def test_the_global_generators_are_left_alone(path):
    dataset = CocoDataset(read_coco(path), Augment(VARIED))
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for index in range(3):
        dataset[index]
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


def test_cached_pictures_are_the_same(path):
    data = read_coco(path)
    plain, cached = (CocoDataset(data, Augment(VARIED), cache_images=cache) for cache in (False, True))
    for picture in (path.parent / "images").iterdir():
        picture.unlink()
    with pytest.raises(DataError, match="no such picture"):
        plain[0]
    with pytest.raises(DataError, match=r"no such picture \(nor 2 more of 3\)"):
        CocoDataset(data)
    assert [len(cached[index]) for index in range(3)] == [2, 2, 2]
    flat(cached[0])


def test_cache_changes_no_sample(path):
    data = read_coco(path)
    plain, cached = (CocoDataset(data, Augment(VARIED), cache_images=cache) for cache in (False, True))
    for index in range(3):
        assert flat(plain[SampleKey(index, 5)]) == flat(cached[SampleKey(index, 5)])


def test_objects_cut_by_the_crop(make_coco, square):
    """Over many crops: boxes of masked objects fit their masks, those without are clipped, slivers are gone."""
    path = make_coco(
        [(40, 40)],
        [{"segmentation": [square(4, 4, 20)]}, {"bbox": [10, 12, 24, 20]}, {"bbox": [0, 0, 9, 9], "iscrowd": 1}],
    )
    config = AugmentConfig(crop_size=20, scale_range=(2.0, 2.0), horizontal_flip=0.0, min_visible=0.3)
    dataset = CocoDataset(read_coco(path), Augment(config))
    counts = set()
    for epoch in range(60):
        _, target = dataset[SampleKey(0, epoch)]
        counts.add(len(target["boxes"]))
        for box, mask, has_mask, label in zip(
            target["boxes"], target["masks"], target["has_mask"], target["labels"], strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            area, full = (x2 - x1) * (y2 - y1), (20 * 20 if has_mask else 24 * 20)
            assert area >= 0.3 * full - 1e-3 and label == 1
            if has_mask:
                assert mask[int(y1) : int(y2), int(x1) : int(x2)].all() and mask.sum() == area
        for x1, y1, x2, y2 in target["ignore_boxes"].tolist():
            assert 0 <= x1 < x2 <= 20 and 0 <= y1 < y2 <= 20
    assert counts == {0, 1, 2} or counts == {1, 2}


def test_copy_paste_draws_only_from_pictures_with_masks(make_coco, square):
    path = make_coco(
        [(10, 10), (10, 10), (10, 10)],
        [
            {"image_id": 1, "bbox": [0, 0, 9, 9]},
            {"image_id": 2, "segmentation": [square(0, 0, 5)], "iscrowd": 1},
            {"image_id": 3, "segmentation": [square(2, 2, 3)], "category_id": 90},
        ],
    )
    config = AugmentConfig(short_sides=(), copy_paste=1.0, horizontal_flip=0.0)
    dataset = CocoDataset(read_coco(path), Augment(config))
    for epoch in range(5):
        _, target = dataset[SampleKey(1, epoch)]
        assert target["labels"].tolist() == [3] and target["boxes"].tolist() == [[2, 2, 5, 5]]
        assert len(target["ignore_boxes"]) == 1


def test_refuses(path):
    data = read_coco(path)
    with pytest.raises(ValueError, match="seed is -1"):
        CocoDataset(data, seed=-1)
    dataset = CocoDataset(data)
    for index in (3, -1):
        with pytest.raises(IndexError):
            dataset[index]
    Image.new("RGB", (5, 5)).save(path.parent / "images" / "0.png")
    with pytest.raises(DataError, match="its annotations say 20 x 30"):
        dataset[0]
    with pytest.raises(DataError, match="its annotations say 20 x 30"):
        CocoDataset(data, cache_images=True)


def test_wide_and_collate(path):
    dataset = CocoDataset(read_coco(path))
    assert dataset.wide().tolist() == [True, False, True]
    samples = [dataset[0], dataset[1]]
    images, targets = collate(samples)
    assert images[1] is samples[1][0] and targets[0] is samples[0][1]
