"""Guidance of a network that began as a plain one rises over the warm-up; others keep all of it."""

import torch
from torch import nn

from dsg.model import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint
from dsg.model.training.guidance import raise_guidance
from dsg.model.training.initial import initialise

SMALL = {"channels": 8, "box_head_width": 16}


class Guided(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.register_buffer("guidance_scale", torch.tensor(share))


def test_it_rises_with_the_warm_up_and_never_falls():
    plain, whole, without = Guided(0.0), Guided(1.0), nn.Linear(1, 1)
    shares = []
    for iteration in range(6):
        raise_guidance([plain, whole, without], iteration, 4)
        shares.append(float(plain.guidance_scale))
        assert float(whole.guidance_scale) == 1
    assert shares == [0.25, 0.5, 0.75, 1, 1, 1]
    raise_guidance([plain], 0, 4)  # a later run of the same weights
    assert float(plain.guidance_scale) == 1
    at_once = Guided(0.0)
    raise_guidance([at_once], 0, 0)
    assert float(at_once.guidance_scale) == 1


def test_init_from_a_plain_checkpoint_begins_without_guidance(tmp_path):
    info = CheckpointInfo("plain", "mask_rcnn_lite0_fpn", SMALL, (Category(1, "nut"),), Resize(64, 64), 0.5)
    plain = build("mask_rcnn_lite0_fpn", 1, **SMALL)
    save_checkpoint(tmp_path / "plain.safetensors", plain, info)
    guided = build("dsg_lite0_fpn", 1, **SMALL)
    line = initialise(guided, str(tmp_path / "plain.safetensors"))
    assert "no guidance" in line
    assert float(guided.guidance_scale) == 0 and not guided.fuse_box.conv.weight.any()
    picture = torch.rand(3, 64, 64)
    with torch.no_grad():
        (wanted,), (found,) = plain.eval()([picture]), guided.eval()([picture])
    torch.testing.assert_close(found.boxes, wanted.boxes)
    # from a guided checkpoint all of it is taken as it is
    again = build("dsg_lite0_fpn", 1, **SMALL)
    info = CheckpointInfo("guided", "dsg_lite0_fpn", SMALL, (Category(1, "nut"),), Resize(64, 64), 0.5)
    save_checkpoint(tmp_path / "guided.safetensors", build("dsg_lite0_fpn", 1, **SMALL), info)
    assert "no guidance" not in initialise(again, str(tmp_path / "guided.safetensors"))
    assert float(again.guidance_scale) == 1
