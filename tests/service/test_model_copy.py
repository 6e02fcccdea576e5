"""What workers load their models from."""

import errno
from pathlib import Path

import pytest

from dsg.service import model_copy
from dsg.service.model_copy import ModelCopy


def test_a_copy_outlives_what_it_is_of(tmp_path: Path) -> None:
    source = tmp_path / "best.safetensors"
    source.write_text("a model")
    copy = ModelCopy(str(source))
    source.write_text("another")
    path = Path(copy.path)
    assert (path.name, path.read_text()) == ("best.safetensors", "a model")
    copy.close()
    assert not path.parent.exists() and source.exists()
    copy.close()


def test_a_name_is_left_as_it_is() -> None:
    copy = ModelCopy("dsg_lite0_coco")
    assert copy.path == "dsg_lite0_coco"
    copy.close()


def test_errors_name_what_the_operator_named(tmp_path: Path) -> None:
    source = tmp_path / "best.safetensors"
    source.write_text("a model")
    copy = ModelCopy(str(source))
    error = ValueError(f"{copy.path} is no checkpoint", 7)
    copy.own_words(error)
    assert error.args == (f"{source} is no checkpoint", 7)
    copy.close()


def test_where_there_is_no_room_the_file_itself_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = tmp_path / "best.safetensors"
    source.write_text("a model")
    monkeypatch.setattr(model_copy.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(model_copy.shutil, "copyfile", refuse)
    copy = ModelCopy(str(source))
    assert copy.path == str(source) and [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]
    copy.close()
    assert source.exists()
