import numpy as np
import pytest
import torch

import dsg.export
import dsg.model


def test_a_shipped_name_gives_the_predictor_that_the_model_room_gives():
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    name = dsg.export.load("dsg_lite0_coco", "cpu").info.name
    assert name == "dsg_lite0_coco"
    (one,), (other,) = (room.load(name, "cpu").predict([picture], 0.01) for room in (dsg.export, dsg.model))
    assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.onnx", "ONNX files cannot be run by this version"),
        ("model.ts", "TorchScript files cannot be run"),
        ("model.pt2", "AOTInductor files cannot be run"),
        ("model_final.pth", "dsg import-weights model_final.pth"),
    ],
)
def test_files_of_other_kinds_are_named_with_what_to_do(name, message):
    with pytest.raises(ValueError, match=message):
        dsg.export.load(name)
