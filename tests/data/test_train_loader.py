"""Loaders: the order of batches, resuming, ranks and workers."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from dsg.model.data.batches import TrainBatches, repeat_weights
from dsg.model.data.coco import DataError, read_coco
from dsg.model.data.dataset import CocoDataset, SampleKey
from dsg.model.data.loader import build_eval_loader, build_train_loader
from dsg.model.data.packed import PackedBatch
from dsg.model.data.transforms import Augment, AugmentConfig

# Python 3.12 warns of any fork in a process with threads; torch's own are idle there.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def take(iterable, count):
    return list(itertools.islice(iterable, count))


def content(batch):
    """A batch as plain values, to compare two."""
    images, targets = batch
    return [
        (image.shape, image.numpy().tobytes(), *(v.tolist() if hasattr(v, "tolist") else v for v in t.values()))
        for image, t in zip(images, targets, strict=True)
    ]


@pytest.fixture
def dataset(make_coco, square):
    sizes = [(12, 20), (20, 12), (16, 16), (10, 30), (30, 10), (14, 20), (20, 14), (18, 20), (13, 13)]
    path = make_coco(
        sizes,
        [{"image_id": index + 1, "segmentation": [square(1, 2, 7)]} for index in range(len(sizes) - 1)],
    )
    config = AugmentConfig(short_sides=(12, 16), long_side=40, color_jitter=0.5, copy_paste=0.5)
    return CocoDataset(read_coco(path), Augment(config), seed=1)


@pytest.mark.parametrize(("length", "size"), [(10, 2), (11, 4), (7, 7), (3, 5), (1, 4), (100, 16)])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_has_every_picture_once(length, size, drop_last, grouped):
    groups = np.arange(length) % 3 == 0 if grouped else None
    batches = TrainBatches(length, size, seed=5, groups=groups, drop_last=drop_last)
    full, rest = divmod(length, size)
    assert batches.batches_per_epoch == (max(full, 1) if drop_last else full + (rest > 0))
    left_out = set()
    for epoch in range(4):
        start = epoch * batches.batches_per_epoch
        keys = [key for k in range(batches.batches_per_epoch) for key in batches.batch(start + k)]
        assert len(keys) == batches.batches_per_epoch * size == len(set(keys))
        assert {key.epoch for key in keys} == {epoch}
        first_lap = Counter(key.picture for key in keys if key.lap == 0)
        assert set(first_lap.values()) == {1}
        if len(keys) >= length:
            assert len(first_lap) == length
            laps = [key.lap for key in keys]
            assert Counter(laps)[0] == length and max(laps) <= -(-len(keys) // length) - 1 + (rest > 0)
        else:
            left_out.add(tuple(sorted(set(range(length)) - set(first_lap))))
    if left_out:
        assert len(left_out) > 1  # not the same pictures each time


def test_groups_are_kept_apart_as_far_as_possible():
    groups = np.arange(50) < 17
    batches = TrainBatches(50, 4, seed=0, groups=groups)
    mixed = 0
    for k in range(batches.batches_per_epoch):
        mixed += len({bool(groups[key.picture]) for key in batches.batch(k)}) > 1
    # 17 = 4 * 4 + 1 and 33 = 8 * 4 + 1: what is left over makes no full batch.
    assert mixed == 0 and batches.batches_per_epoch == 12


def test_order_is_new_in_each_epoch_and_by_seed():
    def order(seed, epoch):
        batches = TrainBatches(20, 5, seed=seed)
        return [key.picture for k in range(4) for key in batches.batch(4 * epoch + k)]

    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert order(1, 2) == order(1, 2)


def test_batch_k_whatever_came_before():
    batches = TrainBatches(23, 4, seed=9, groups=np.arange(23) % 2 == 0)
    straight = take(iter(batches), 40)
    assert [batches.batch(k) for k in reversed(range(40))] == straight[::-1]
    for start in (1, 5, 17):
        later = TrainBatches(23, 4, seed=9, groups=np.arange(23) % 2 == 0, start=start)
        assert take(iter(later), 40 - start) == straight[start:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_batch(world_size):
    whole = TrainBatches(23, 8, seed=9)
    parts = [take(iter(TrainBatches(23, 8, seed=9, rank=rank, world_size=world_size)), 9) for rank in range(world_size)]
    for k in range(9):
        assert {len(part[k]) for part in parts} == {8 // world_size}
        assert sorted(key for part in parts for key in part[k]) == sorted(whole.batch(k))


def test_refuses():
    with pytest.raises(ValueError, match="batch of 6 images for 4 processes; make it a multiple of 4"):
        TrainBatches(10, 6, seed=0, world_size=4)
    with pytest.raises(ValueError, match="batch of 0"):
        TrainBatches(10, 0, seed=0)
    with pytest.raises(ValueError, match="rank is 2; it must lie in 0 to 1"):
        TrainBatches(10, 4, seed=0, rank=2, world_size=2)
    with pytest.raises(DataError, match="no picture"):
        TrainBatches(0, 4, seed=0)


def test_loaders_refuse(dataset):
    with pytest.raises(ValueError, match="workers is -1"):
        build_train_loader(dataset, 2, seed=0, workers=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        build_eval_loader(dataset, batch_size=0)
    with pytest.raises(ValueError, match="rank is 1"):
        build_eval_loader(dataset, rank=1)


def test_results_do_not_depend_on_workers(dataset):
    here, there = (
        [content(batch) for batch in take(build_train_loader(dataset, 3, seed=2, workers=workers), 7)]
        for workers in (0, 2)
    )
    assert here == there
    assert len({one for batch in here for one in (item[1] for item in batch)}) == 21


def test_resumes_exactly_also_with_other_ranks(dataset):
    whole = [content(batch) for batch in take(build_train_loader(dataset, 4, seed=2, workers=0), 9)]
    later = build_train_loader(dataset, 4, seed=2, workers=0, start=5)
    assert [content(batch) for batch in take(later, 4)] == whole[5:]
    for rank in range(2):
        part = build_train_loader(dataset, 4, seed=2, workers=0, start=5, rank=rank, world_size=2)
        assert [content(batch) for batch in take(part, 4)] == [batch[rank::2] for batch in whole[5:]]
    assert later.batches_per_epoch == 2


def test_batches_have_one_orientation_unless_the_crop_makes_them_alike(dataset):
    loader = build_train_loader(dataset, 3, seed=0, workers=0)
    assert loader.batches_per_epoch == 3
    wide = dataset.wide()  # 6 wide ones and 3 high ones
    for k in range(6):
        assert len({bool(wide[key.picture]) for key in loader.batches.batch(k)}) == 1
    square = CocoDataset(dataset.data, Augment(AugmentConfig(crop_size=16)))
    loader = build_train_loader(square, 3, seed=0, workers=0)
    assert any(len({bool(wide[key.picture]) for key in loader.batches.batch(k)}) == 2 for k in range(6))
    images, targets = next(iter(loader))
    assert {image.shape for image in images} == {(3, 16, 16)} and len(targets) == 3


def test_few_storages_per_batch(dataset):
    images, targets = next(iter(build_train_loader(dataset, 3, seed=0, workers=0)))
    tensors = images + [value for target in targets for value in target.values() if torch.is_tensor(value)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}) <= 4
    assert targets[0]["masks"].shape[1:] == images[0].shape[1:]


def test_making_batches_takes_nothing_from_the_global_generator(dataset):
    state = torch.get_rng_state()
    take(build_train_loader(dataset, 3, seed=0, workers=0), 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_one_line_from_any_process(dataset, workers):
    path = dataset.data.records[4].path
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        take(build_train_loader(dataset, 9, seed=0, workers=workers), 1)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_eval_gives_each_picture_once_and_whole(dataset):
    plain = CocoDataset(dataset.data)
    loader = build_eval_loader(plain, batch_size=2, workers=2)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    assert [target["image_id"] for _, targets in batches for target in targets] == list(range(1, 10))
    shapes = [tuple(image.shape[1:]) for images, _ in batches for image in images]
    assert shapes == [record.size for record in dataset.data.records]
    ids = [
        [target["image_id"] for _, targets in build_eval_loader(plain, rank=rank, world_size=4) for target in targets]
        for rank in range(4)
    ]
    assert ids == [[1, 5, 9], [2, 6], [3, 7], [4, 8]]


def test_keys_are_what_the_dataset_takes(dataset):
    loader = build_train_loader(dataset, 3, seed=2, workers=0)
    images, _ = next(iter(loader))
    keys = loader.batches.batch(0)
    assert all(isinstance(key, SampleKey) for key in keys)
    for key, image in zip(keys, images, strict=True):
        assert torch.equal(dataset[key][0], image)


@pytest.mark.parametrize("grouped", [True, False])
def test_weights_say_how_often_a_picture_comes_up(grouped):
    weights = np.array([1.0, 1, 1, 1, 2.5, 4, 1, 1, 1, 1, 1, 0.5])  # they sum to 16: each counts for 12 / 16
    groups = np.arange(12) % 2 == 0 if grouped else None
    batches = TrainBatches(12, 4, seed=3, groups=groups, weights=weights)
    seen = np.zeros(12)
    for epoch in range(200):
        keys = [key for k in range(3) for key in batches.batch(3 * epoch + k)]
        assert len(set(keys)) == 12  # one that comes up again is varied anew
        times = np.bincount([key.picture for key in keys], minlength=12)
        assert (np.abs(times - weights * 0.75) < 1).all()
        seen += times
    assert seen / 200 == pytest.approx(weights * 0.75, abs=0.12)


def test_equal_weights_show_each_picture_once():
    batches = TrainBatches(10, 5, seed=1, weights=np.full(10, 3.0))
    assert sorted(key.picture for k in range(2) for key in batches.batch(k)) == list(range(10))


def test_rare_classes_ask_for_their_pictures(make_coco, square):
    # 8 pictures: class 1 on all but the last, class 2 on two of them, class 3 on one as a crowd
    annotations = [{"image_id": i + 1, "category_id": 1, "segmentation": [square(1, 2, 7)]} for i in range(7)]
    annotations += [{"image_id": i, "category_id": 2, "segmentation": [square(1, 2, 7)]} for i in (1, 2)]
    annotations += [{"image_id": 3, "category_id": 3, "iscrowd": 1, "segmentation": [square(1, 2, 7)]}]
    data = read_coco(make_coco([(16, 16)] * 8, annotations, categories=[{"id": i, "name": str(i)} for i in (1, 2, 3)]))
    assert repeat_weights(data, 0.5).tolist() == [2**0.5, 2**0.5, 1, 1, 1, 1, 1, 1]
    assert repeat_weights(data, 0.2).tolist() == [1] * 8
    found = build_train_loader(CocoDataset(data), 4, seed=0, workers=0, repeat_below=0.5).batches
    drawn = Counter(key.picture for k in range(200) for key in found.batch(k))
    assert drawn[0] / drawn[5] == pytest.approx(2**0.5, rel=0.15)


def test_packing_changes_nothing_and_moves_with_few_copies(dataset):
    keys = [SampleKey(index) for index in range(5)]
    images, targets = [dataset[key][0] for key in keys], [dataset[key][1] for key in keys]
    packed = PackedBatch((images, targets))
    for batch in (packed.unpack(), packed.to(torch.device("cpu")).unpack()):
        assert content(batch) == content((images, targets))
    assert [target["image_id"] for target in packed.unpack()[1]] == [target["image_id"] for target in targets]
    storages = {tensor.untyped_storage().data_ptr() for target in packed.unpack()[1] for tensor in target.values()
                if isinstance(tensor, torch.Tensor) and tensor.numel()}  # fmt: skip
    assert len(storages) == 4  # float32, int64, uint8, bool
