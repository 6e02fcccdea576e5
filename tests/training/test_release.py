"""What the best weights say about their data, and where new weights begin."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsg.model import build
from dsg.model.data.records import CocoData, ImageRecord
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, read_info, save_checkpoint
from dsg.model.training.errors import TrainingError
from dsg.model.training.initial import backbone_of, initialise
from dsg.model.training.recipe_file import load_recipe
from dsg.model.training.release import describe, origin_of, save_best

SIZES = {"channels": 16, "box_head_width": 16}


def data_with(*licences):
    records = tuple(ImageRecord(n, Path(f"{n}.jpg"), 9, 9, (), licence) for n, licence in enumerate(licences))
    return CocoData(records, (Category(5, "a"),))


def described(data, origin=None, **changes):
    recipe = load_recipe("nuclei_lite0")
    model = torch.nn.Linear(1, 1)
    return describe(recipe, model, data, name="n", files=["x/train.json", "more.json"], origin=origin or {}, **changes)


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["CC BY 4.0", "CC0"], "Apache-2.0"),
        (
            ["Attribution-NonCommercial-ShareAlike License", "CC BY-NC 2.0", "Attribution License"],
            "Apache-2.0; 2 of 3 training pictures are under NonCommercial licences",
        ),
        (["", "CC0"], "Apache-2.0; 1 of 2 training pictures state no licence"),
        (["Concordance Licence"], "Apache-2.0"),
    ],
)
def test_licence_says_what_the_pictures_ask_for(licences, expected):
    assert described(data_with(*licences)).licence == expected


def test_a_licence_goes_on_to_hold_for_what_starts_from_it():
    info = described(data_with("CC0"), {"name": "older", "licence": "Apache-2.0; 3 of 4 ... NonCommercial"})
    assert info.licence == "Apache-2.0; started from older: Apache-2.0; 3 of 4 ... NonCommercial"
    assert info.notes["started_from"] == "older"
    free = described(data_with("CC0"), {"name": "older", "licence": "Apache-2.0"})
    assert free.licence == "Apache-2.0"


def test_notes_count_licences_and_name_data_and_recipe():
    info = described(data_with("A", "B", "A", ""))
    assert info.notes["data_licences"] == "A: 2; B: 1; not stated: 1"
    assert info.notes["data"] == "train.json, more.json"
    assert (info.notes["recipe"], info.notes["training_pictures"]) == ("nuclei_lite0", "4")
    assert (info.resize, info.max_detections) == (Resize(512, 1024), 400)
    assert info.overrides["max_detections"] == 400 and info.category_ids == [5]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Mask R-CNN of two classes, saved."""
    path = tmp_path_factory.mktemp("weights") / "older.safetensors"
    model = build("mask_rcnn_lite0_fpn", 2, **SIZES)
    categories = (Category(1, "a"), Category(2, "b"))
    info = CheckpointInfo("older", "mask_rcnn_lite0_fpn", SIZES, categories, Resize(64, 64), 0.5, licence="mine")
    save_checkpoint(path, model, info)
    return path, model


def test_origin(checkpoint, tmp_path):
    assert origin_of(None) == {}
    assert origin_of(str(checkpoint[0])) == {"name": "older", "licence": "mine"}
    save_file({"a": torch.zeros(1)}, tmp_path / "body.safetensors")
    assert origin_of(str(tmp_path / "body.safetensors")) == {"name": "body.safetensors", "licence": ""}


def test_a_dsg_starts_from_a_mask_rcnn(checkpoint):
    path, older = checkpoint
    model = build("dsg_lite0_fpn", 2, **SIZES)
    line = initialise(model, str(path))
    own, found = model.state_dict(), older.state_dict()
    taken = [name for name in own if name in found]
    assert taken and all(torch.equal(own[name], found[name]) for name in taken)
    # what it lacks is filled so that the network starts from the older one's predictions
    assert len(taken) < len(own) and own["guidance_scale"] == 0
    whole = f"init: {len(own)} of {len(own)} tensors from older.safetensors, which has no guidance"
    assert line == f"{whole}: it comes in over the warm-up"


def test_the_same_network_leaves_nothing_fresh(checkpoint):
    path, _ = checkpoint
    model = build("mask_rcnn_lite0_fpn", 2, **SIZES)
    count = len(model.state_dict())
    assert initialise(model, str(path)) == f"init: {count} of {count} tensors from older.safetensors"


def test_weights_that_do_not_fit(checkpoint, tmp_path):
    with pytest.raises(TrainingError, match=r"none of its tensors fits this network"):
        initialise(torch.nn.Linear(1, 1), str(checkpoint[0]))
    save_file({"a": torch.zeros(1)}, tmp_path / "body.safetensors")
    with pytest.raises(TrainingError, match=r"the network has no part `backbone`"):
        initialise(torch.nn.Linear(1, 1), str(tmp_path / "body.safetensors"))
    with pytest.raises(ValueError, match=r"body.safetensors does not fit EfficientNetLite: it lacks"):
        initialise(build("dsg_lite0_fpn", 2, **SIZES), str(tmp_path / "body.safetensors"))


def test_the_backbone_is_the_part_below_the_pyramid(tiny_detector):
    model = build("dsg_lite0_fpn", 2, **SIZES)
    assert type(backbone_of(model)).__name__ == "EfficientNetLite"
    tiny = tiny_detector()
    assert backbone_of(tiny) is tiny.backbone
    assert backbone_of(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("half", [True, False])
def test_best_weights_hold_their_scores(half, tmp_path):
    model = build("mask_rcnn_lite0_fpn", 1, **SIZES)
    info = CheckpointInfo("n", "mask_rcnn_lite0_fpn", SIZES, (Category(4, "a"),), Resize(64, 64), 0.5)
    path = tmp_path / "best.safetensors"
    save_best(path, model, info, iteration=30, metrics={"AP": 0.25, "segm/AP": 0.25, "bbox/AP": 0.5}, half=half)
    notes = read_info(path).notes
    assert notes == {"iterations": "30", "validation": "segm/AP 0.2500, bbox/AP 0.5000"}
    floats = sum(tensor.numel() for tensor in model.state_dict().values())
    assert path.stat().st_size < floats * (2.3 if half else 4.3)
