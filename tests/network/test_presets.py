"""Every name of the presets, what it is made of and what it costs."""

import itertools

import pytest
import torch
from family_cases import SMALL, picture_and_target, without_gradient

from dsg.model import build, presets
from dsg.model.network.cost import TABLE_1, known_costs, measure, table_1
from dsg.model.network.presets import preset_config

SYSTEMS = ("mask_rcnn", "dsg", "cascade_mask_rcnn", "cascade_dsg", "htc", "htc_dsg", "dsc")
DEFORMABLE = ("r50", "r101", "x101_32x4d", "x101_32x8d", "x101_64x4d")
NAMES = [f"{s}_{b}_fpn" for s, b in itertools.product(SYSTEMS, (*DEFORMABLE, "lite0", "lite2"))]
NAMES += [f"{s}_{b}_dcn_fpn" for s, b in itertools.product(SYSTEMS, DEFORMABLE)] + ["mask_rcnn_r50_v2_fpn"]
QUICK = ("dsg_r50_dcn_fpn", "dsc_x101_32x4d_fpn", "mask_rcnn_r50_v2_fpn", "htc_dsg_lite2_fpn")


def test_names():
    assert sorted(presets()) == sorted(NAMES)
    assert set(known_costs()) == set(NAMES)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_trains_a_step_and_predicts(name):
    torch.manual_seed(0)
    model = build(name, 3, **SMALL, **({"dcn_modulated": True} if "x101_64x4d_dcn" in name else {}))
    picture, target = picture_and_target()
    losses = model([picture], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values()) and without_gradient(model) == []
    with torch.no_grad():
        (found,) = model.eval()([picture])
    assert found.mask_probs.shape == (len(found), 28, 28)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_the_table_holds_what_is_measured(name):
    assert known_costs()[name] == measure(name)


def test_sizes_of_table_1():
    assert [round(cost.parameters / 1e6, 2) for cost in table_1()] == [44.35, 46.97, 47.56, 47.56, 48.15, 48.15]
    assert len(TABLE_1) == 6


def test_arithmetic_by_hand():
    """Switches change it by the multiply-adds of their layers: MPN 14 * 14 * (4 * 9 * 256^2 + 4 * 256^2 + 4 * 256) for
    each of 1,000 proposals (its output has 28 x 28 cells); its four convolutions, 14 * 14 * 4 * 9 * 256^2, again for
    each of 100 detections where their mask head is given its features; a fusion 14 * 14 * 9 * 256^2."""
    baseline, mrpn, fuse_mask, _, fuse_box, _ = (cost.gflops for cost in table_1())
    mpn = 196 * (4 * 9 * 256**2 + 4 * 256**2 + 4 * 256) / 1e9
    fusion = 196 * 9 * 256**2 / 1e9
    assert mrpn - baseline == pytest.approx(1000 * mpn, abs=0.11)
    assert fuse_mask - mrpn == pytest.approx(100 * (fusion + 196 * 4 * 9 * 256**2 / 1e9), abs=0.11)
    assert fuse_box - fuse_mask == pytest.approx(1000 * fusion, abs=0.11)


def test_switches_that_do_not_go_together_are_named():
    for name, overrides, says in (
        ("dsg_lite0_fpn", {"dcn": True}, "dcn is there for resnet50"),
        ("dsg_r50_fpn", {"dcn_modulated": True}, "needs dcn=True"),
        ("dsg_r50_fpn", {"semantic": "instances"}, "needs cascade=True"),
        ("htc_r50_fpn", {"semantic": "things"}, "semantic must be one of"),
        ("htc_r50_fpn", {"mask_iou": True}, "for one stage only"),
        ("cascade_dsg_r50_fpn", {"sgra_mask": True}, "for one stage only"),
        ("cascade_dsg_r50_fpn", {"stage_ious": (0.5, 0.6)}, "stage_delta_weights has 3 entries for 2 stages"),
        ("cascade_dsg_r50_fpn", {"mask_stages": 4}, "mask_stages must be in 1..3"),
        ("dsc_r50_fpn", {"mrpn": False, "fuse_mask": False, "sgra_box": False, "fuse_box": False}, "needs mrpn=True"),
    ):
        with pytest.raises(ValueError, match=says):
            preset_config(name, **overrides)
