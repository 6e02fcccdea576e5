"""Sizes of the paper's Table 1: R-50 FPN, 81 outputs, frozen batch norm uncounted."""

import pytest
import torch

from dsg.model import build, presets

TABLE1 = [
    # mRPN, F_M, SgRA_B, F_B, SgRA_M -> parameters; in millions as printed
    ((0, 0, 0, 0, 0), 44_347_573, "44.35"),
    ((1, 0, 0, 0, 0), 46_970_550, "46.97"),
    ((1, 1, 0, 0, 0), 47_560_630, "47.56"),
    ((1, 1, 1, 0, 0), 47_560_630, "47.56"),
    ((1, 1, 1, 1, 0), 48_150_710, "48.15"),
    ((1, 1, 1, 1, 1), 48_150_710, "48.15"),
]
SWITCHES = ("mrpn", "fuse_mask", "sgra_box", "fuse_box", "sgra_mask")


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("on", "parameters", "printed"), TABLE1)
def test_table_1(on, parameters, printed, capsys):
    with torch.device("meta"):
        model = build("mask_rcnn_r50_fpn", **dict(zip(SWITCHES, map(bool, on), strict=True)))
    with capsys.disabled():
        marks = " ".join("x" if switch else "-" for switch in on)
        print(f"\n  Table 1 | {marks} | {count(model):>10,} | {printed} M", end="")  # noqa: T201 - the table is what is wanted
    assert count(model) == parameters
    assert f"{count(model) / 1e6:.2f}" == printed


def test_dsg_preset_is_mask_rcnn_with_the_four_designs():
    with torch.device("meta"):
        assert count(build("dsg_r50_fpn")) == 48_150_710
        assert count(build("dsg_r50_fpn", fuse_kernel=1)) == 44_347_573 + 2_622_977 + 2 * 65_792


def test_lite_presets_have_at_most_12_million_parameters():
    with torch.device("meta"):
        for name in presets():
            if "lite" in name and name.startswith(("mask_rcnn", "dsg")):  # a cascade has three box heads
                assert count(build(name)) <= 12_000_000, name
