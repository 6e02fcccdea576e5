"""Several files as one set, and the split by a hash of the image id."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from dsg.model.data.coco import Annotation, CocoData, DataError, ImageRecord, join, read_coco, split
from dsg.model.network.checkpoint import Category


def record(image_id: int, *labels: int) -> ImageRecord:
    objects = tuple(Annotation((0, 0, 1, 1), label, None, False, i) for i, label in enumerate(labels))
    return ImageRecord(image_id, Path(f"{image_id}.png"), 4, 4, objects)


A = CocoData((record(1, 1, 2), record(5)), (Category(3, "cat"), Category(8, "dog")))
B = CocoData((record(2, 1, 2, 3),), (Category(3, "dog"), Category(30, "cow", "farm"), Category(1, "cat")))


def test_join_by_name_keeps_the_first_files_ids():
    joined = join([A, B])
    assert joined.categories == (Category(3, "cat"), Category(8, "dog"), Category(30, "cow", "farm"))
    assert [one.category_id for one in joined.records[0].annotations] == [1, 2]
    # dog, cow, cat of the second file
    assert [one.category_id for one in joined.records[2].annotations] == [2, 3, 1]
    assert [r.id for r in joined.records] == [1, 5, 2]


def test_join_of_one_changes_nothing():
    assert join([A]) == A


def test_join_gives_an_id_that_an_earlier_file_uses_for_another_name_a_new_number(caplog):
    """Two files that both count from 1: names decide, the first file's ids stay."""
    other = CocoData((record(2, 1, 2),), (Category(8, "cow"), Category(3, "cat")))
    joined = join([A, other])
    assert joined.categories == (Category(3, "cat"), Category(8, "dog"), Category(9, "cow"))
    assert [one.category_id for one in joined.records[-1].annotations] == [3, 1]
    assert "'cow' has id 9 in the joined set" in caplog.text


def test_join_of_nothing_is_refused():
    with pytest.raises(DataError, match="no data"):
        join([])


def test_join_gives_used_image_ids_new_ones():
    joined = join([A, replace(A), replace(A)])
    assert [r.id for r in joined.records] == [1, 5, 6, 7, 8, 9]
    assert [r.file_id for r in joined.records] == [None, None, 1, 5, 1, 5]
    again = join([joined, A])
    assert [r.file_id for r in again.records[-2:]] == [1, 5]
    assert len({r.id for r in again.records}) == 8


def many(count: int) -> CocoData:
    return CocoData(tuple(record(image_id, 1) for image_id in range(count)), (Category(1, "a"),))


def test_split_is_the_documented_hash():
    data = many(400)
    train, val = split(data, 0.25)
    expected = [
        image_id
        for image_id in range(400)
        if int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:8], "big") < 0.25 * 2**64
    ]
    assert [r.id for r in val.records] == expected
    assert sorted(r.id for r in train.records + val.records) == list(range(400))
    assert 70 < len(val.records) < 130
    assert train.categories == val.categories == data.categories


def test_split_never_changes():
    _, val = split(many(60))
    assert [r.id for r in val.records] == [9, 39, 49, 51, 55]


def test_a_pictures_part_does_not_depend_on_the_others():
    whole = {r.id for r in split(many(500))[1].records}
    part = CocoData(many(500).records[100:400], (Category(1, "a"),))
    assert {r.id for r in split(part)[1].records} == {image_id for image_id in whole if 100 <= image_id < 400}


def test_pictures_of_one_id_in_two_files_go_to_the_same_part():
    data = many(100)
    train, val = split(join([data, data]), 0.3)
    ids = [[r.id if r.file_id is None else r.file_id for r in part.records] for part in (train, val)]
    assert not set(ids[0]) & set(ids[1])
    assert sorted(ids[0] + ids[1]) == sorted([*range(100), *range(100)])


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_neither_part_is_empty(count, fraction):
    train, val = split(many(count), fraction)
    assert train.records and val.records


def test_split_refuses():
    with pytest.raises(DataError, match="one picture cannot be split"):
        split(many(1))
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            split(many(5), fraction)


def test_joined_files_on_disk(make_coco):
    box = {"bbox": [1, 1, 2, 2]}
    first = make_coco([(4, 4)], [{**box, "category_id": 90}], name="one")
    second = make_coco([(4, 4)], [{**box, "category_id": 5}], [{"id": 5, "name": "date"}], name="two")
    joined = join([read_coco(first), read_coco(second)])
    assert [joined.categories[r.annotations[0].category_id - 1].id for r in joined.records] == [90, 90]
    assert [r.path.parent.parent.name for r in joined.records] == ["one", "two"]
