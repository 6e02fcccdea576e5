"""The pictures that a run keeps for validation, written for `dsg eval`."""

from dsg.model.data.coco import read_coco, split
from dsg.model.training.sources import write_held_out


def test_the_written_file_holds_the_same_pictures_and_objects(shapes, tmp_path):
    _, kept = split(read_coco(shapes(tmp_path / "set", 40)), 0.3)
    assert 2 <= len(kept.records) < 38
    (tmp_path / "runs").mkdir()
    write_held_out(tmp_path / "runs" / "held_out.json", kept)

    found = read_coco(tmp_path / "runs" / "held_out.json", tmp_path / "runs")
    assert found.categories == kept.categories
    for record, wanted in zip(found.records, kept.records, strict=True):
        assert (record.id, record.height, record.width) == (wanted.id, wanted.height, wanted.width)
        assert record.path.resolve() == wanted.path.resolve() and record.path.is_file()
        assert [one.category_id for one in record.annotations] == [one.category_id for one in wanted.annotations]
        for one, other in zip(record.annotations, wanted.annotations, strict=True):
            assert one.box == other.box and (one.segmentation is None) == (other.segmentation is None)
