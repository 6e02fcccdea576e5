"""`dsg models`: the table of presets, what can be imported into them, and the weights that ship."""

import json
from collections.abc import Callable

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from dsg.model import presets
from dsg.model.network.known_weights import KNOWN_WEIGHTS


def test_the_table_for_programs(command: Callable) -> None:
    document = json.loads(command("models", "--json").out)
    assert [preset["name"] for preset in document["presets"]] == presets()
    by_name = {preset["name"]: preset for preset in document["presets"]}
    assert by_name["dsg_r50_fpn"]["switches"] == ["mrpn", "fuse_mask", "sgra_box", "fuse_box"]
    assert by_name["htc_x101_64x4d_dcn_fpn"]["switches"] == ["cascade", "interleaved", "dcn", "semantic"]
    assert all(preset["gflops"] > 0 for preset in document["presets"])
    assert [round(row["parameters"] / 1e6, 2) for row in document["table_1"]][:5] == [44.35, 46.97, 47.56, 47.56, 48.15]
    guided, plain = by_name["htc_dsg_r50_fpn"], by_name["htc_r50_fpn"]
    assert guided["known_weights"] == plain["known_weights"] and plain["known_weights"][0]["from"] == "mmdet"


def test_the_table_for_people(command: Callable) -> None:
    lines = command("models").out.splitlines()
    line = next(line for line in lines if line.split()[:1] == ["cascade_dsg_r50_fpn"])
    assert "83.44 M" in line and "mrpn" in line and "detectron2 mmdet" in line
    assert any("mrpn, fuse_mask, sgra_box, fuse_box " in line and "48.15 M" in line for line in lines)


def test_addresses_are_torchvisions_own_and_presets_exist() -> None:
    urls = {known.preset: known.url for known in KNOWN_WEIGHTS if known.project == "torchvision"}
    assert urls["mask_rcnn_r50_fpn"] == MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url
    assert urls["mask_rcnn_r50_v2_fpn"] == MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url
    assert {known.preset for known in KNOWN_WEIGHTS} <= set(presets())
