import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsg.model import build
from dsg.model.network.checkpoint import (
    JUST_ABOVE_ONE,
    Category,
    CheckpointError,
    CheckpointInfo,
    Resize,
    load_checkpoint,
    read_info,
    rewrite_info,
    save_checkpoint,
)

OVERRIDES = {
    "channels": 16,
    "box_head_width": 32,
    "anchor_sizes": ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)),
    "proposals": 20,
}
INFO = CheckpointInfo(
    name="two_things",
    preset="dsg_lite0_fpn",
    overrides=OVERRIDES,
    categories=(Category(17, "cat", "animal"), Category(3, "car")),
    resize=Resize(96, 128),
    score_threshold=0.4,
    max_detections=20,
    licence="CC BY 4.0",
    notes={"data": "none", "AP": "0.1 ± 0"},
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = build(INFO.preset, 2, **OVERRIDES).eval()
    return model, tmp_path / "model.safetensors", save_checkpoint(tmp_path / "model.safetensors", model, INFO)


def test_what_is_saved_is_loaded(saved):
    model, path, info = saved
    loaded, found = load_checkpoint(path)
    assert found == replace(info, overrides=json.loads(json.dumps(OVERRIDES)))
    assert replace(info, hash="", version="") == INFO and len(info.hash) == 64
    assert found.category_ids == [17, 3] and found.category_names == ["cat", "car"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    picture = torch.rand(3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded([picture])[0].boxes, model([picture])[0].boxes)
    assert loaded.config == model.config and not loaded.training


def test_half_precision_keeps_statistics_and_predictions_close(saved, tmp_path):
    model, path, _ = saved
    save_checkpoint(tmp_path / "half.safetensors", model, INFO, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * path.stat().st_size
    stored = load_file(tmp_path / "half.safetensors")
    assert stored["box_head.fc1.weight"].dtype == torch.float16
    assert stored["backbone.body.bn0.running_var"].dtype == torch.float32
    loaded, _ = load_checkpoint(tmp_path / "half.safetensors")
    assert loaded.box_head.fc1.weight.dtype == torch.float32
    assert (loaded.box_head.fc1.weight - model.box_head.fc1.weight).abs().max() < 1e-3


def test_a_changed_tensor_is_noticed(saved):
    _, path, info = saved
    tensors = load_file(path)
    tensors["box_head.fc1.bias"][0] += 1
    save_file(tensors, path, metadata={"dsg": info.to_json()})
    with pytest.raises(CheckpointError, match="do not have the hash"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    model, path, _ = saved
    before = path.read_bytes()
    monkeypatch.setattr(
        "dsg.model.network.checkpoint.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full"))
    )
    with pytest.raises(OSError, match="disk is full"):
        save_checkpoint(path, model, INFO)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_files_that_are_no_checkpoints(saved, tmp_path):
    _, path, _info = saved
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_info(tmp_path / "nowhere.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not at all")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:5000])
    for broken in (garbage, truncated):
        with pytest.raises(CheckpointError, match="broken one"):
            load_checkpoint(broken)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match="no checkpoint of dsg"):
        read_info(foreign)
    save_file({"x": torch.zeros(1)}, foreign, metadata={"dsg": '{"name": "x"}'})
    with pytest.raises(CheckpointError, match="description cannot be read"):
        read_info(foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "dsg_r50_fpn"}, "is missing|the preset wants"),
        ({"preset": "nothing"}, "unknown preset"),
        ({"categories": INFO.categories[:1]}, r"classifier\.\w+ is \(3"),
        ({"overrides": {**OVERRIDES, "mrpn": False}}, "need mrpn=True"),
    ],
)
def test_descriptions_that_do_not_fit_the_tensors(saved, tmp_path, change, message):
    _, path, info = saved
    save_file(load_file(path), tmp_path / "other.safetensors", metadata={"dsg": replace(info, **change).to_json()})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_model_of_another_preset_is_not_saved(saved, tmp_path):
    model, *_ = saved
    with pytest.raises(CheckpointError):
        save_checkpoint(
            tmp_path / "wrong.safetensors", model, replace(INFO, preset="mask_rcnn_lite0_fpn", overrides={})
        )
    assert not (tmp_path / "wrong.safetensors").exists()


def test_thresholds_of_classes_are_kept(saved, tmp_path):
    model, *_ = saved
    info = replace(INFO, class_thresholds=(0.25, JUST_ABOVE_ONE), class_precision=0.8)
    save_checkpoint(tmp_path / "chosen.safetensors", model, info)
    found = read_info(tmp_path / "chosen.safetensors")
    assert (found.class_thresholds, found.class_precision) == ((0.25, JUST_ABOVE_ONE), 0.8)
    assert found.default_threshold == (0.25, JUST_ABOVE_ONE)
    assert found.threshold_in_words == "0.25 to 1.00 by class (chosen for 80% right ones)"
    assert INFO.default_threshold == 0.4 and INFO.threshold_in_words == "0.4"


def test_a_file_from_before_there_were_thresholds_of_classes(saved, tmp_path):
    _, path, info = saved
    document = json.loads(info.to_json())
    del document["class_thresholds"], document["class_precision"]
    save_file(load_file(path), tmp_path / "old.safetensors", metadata={"dsg": json.dumps(document)})
    _, found = load_checkpoint(tmp_path / "old.safetensors")
    assert (found.class_thresholds, found.class_precision, found.default_threshold) == ((), 0.0, 0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_thresholds": [0.5]}, "must be one for each of 2 categories, got 1"),
        ({"class_thresholds": [0.5, -0.1]}, r"class_thresholds must be numbers in 0..1, got -0.1"),
        ({"class_thresholds": [0.5, 1.1]}, r"class_thresholds must be numbers in 0..1, got 1.1"),
        ({"class_thresholds": [0.5, float("nan")]}, "got nan"),
        ({"class_thresholds": [True, 0.5]}, "got True"),
        ({"class_thresholds": "ab"}, "got 'a'"),
        ({"class_thresholds": 0.5}, "not iterable"),
        ({"class_precision": 1.5}, r"class_precision must be a number in 0..1, got 1.5"),
        ({"class_precision": "0.8"}, "got '0.8'"),
    ],
)
def test_wrong_thresholds_of_classes_are_named(saved, tmp_path, change, message):
    _, path, info = saved
    document = {**json.loads(info.to_json()), **change}
    save_file(load_file(path), tmp_path / "wrong.safetensors", metadata={"dsg": json.dumps(document)})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_info(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors: its description cannot be read" in str(caught.value) and "\n" not in str(caught.value)


def test_another_description_of_the_same_tensors(saved, tmp_path):
    _, path, info = saved
    before = load_file(path)
    save_file(before, path, metadata={"dsg": info.to_json(), "from elsewhere": "kept"})
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    changed = replace(read_info(path), class_thresholds=(0.1, 0.2), class_precision=0.7)
    rewrite_info(link, changed)
    assert link.is_symlink() and read_info(path) == changed
    assert load_checkpoint(path)[1].hash == info.hash
    after = load_file(path)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in after)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["from elsewhere"] == "kept"


def test_a_description_of_other_tensors_is_not_written(saved, tmp_path, monkeypatch):
    _, path, info = saved
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="do not have the hash"):
        rewrite_info(path, replace(info, hash="0" * 64))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        rewrite_info(tmp_path / "nowhere.safetensors", info)

    def dies(*_):
        raise OSError("disk is full")

    monkeypatch.setattr("dsg.model.network.atomic.os.replace", dies)
    with pytest.raises(OSError, match="disk is full"):
        rewrite_info(path, info)
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == [path.name]
