"""Files of detectron2 and mmdetection: everything in them finds its place, and their conventions come along."""

import pickle
import sys

import foreign_layouts
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsg.model.network.checkpoint import read_info
from dsg.model.network.import_detectron2 import import_detectron2
from dsg.model.network.import_mmdet import import_mmdet
from dsg.model.network.presets import preset_config
from dsg.model.network.weight_files import read_foreign


def test_a_zoo_pickle_of_detectron2(tmp_path):
    theirs = foreign_layouts.filled(foreign_layouts.detectron2())
    content = {
        "model": {name: tensor.numpy() for name, tensor in theirs.items()},
        "__author__": "Detectron2 Model Zoo",
    }
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    info = import_detectron2(tmp_path / "model.pkl", "mask_rcnn_r50_fpn", tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    assert len(ours) == len(theirs)
    assert info.hash == read_info(tmp_path / "ours.safetensors").hash
    # pixels: BGR in 0..255 there, RGB in 0..1 here
    stem = theirs["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(ours["backbone.body.conv1.weight"][:, 0], stem[:, 2])
    config = preset_config(info.preset, 80, **info.overrides)
    assert config.pixel_mean == pytest.approx((123.675 / 255, 116.28 / 255, 103.53 / 255))
    assert config.pixel_std == pytest.approx((1 / 255,) * 3)
    # background is the last class there, the first here
    scores = theirs["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(ours["box_head.classifier.bias"], torch.cat([scores[80:], scores[:80]]))
    offsets = theirs["roi_heads.box_predictor.bbox_pred.weight"]
    assert (
        torch.equal(ours["box_head.regressor.weight"][4:], offsets) and not ours["box_head.regressor.weight"][:4].any()
    )
    assert torch.equal(ours["mask_head.predictor.bias"][1:], theirs["roi_heads.mask_head.predictor.bias"])
    block = "backbone.bottom_up.res4.3.conv2"
    assert torch.equal(ours["backbone.body.layer3.3.conv2.weight"], theirs[f"{block}.weight"])
    assert torch.equal(ours["backbone.body.layer3.3.bn2.running_var"], theirs[f"{block}.norm.running_var"])
    assert (config.stride_in_1x1, config.roi_aligned, config.roi_sampling_ratio) == (True, True, 0)
    assert (info.paste, info.resize.rounding, info.resize.antialias) == ("grid", "nearest", True)
    assert info.categories[0].name == "person" and info.category_ids[-1] == 90


def test_a_cascade_of_detectron2_with_deformable_convolutions(tmp_path):
    theirs = foreign_layouts.filled(foreign_layouts.detectron2(cascade=True, deformable=18))
    torch.save({"model": theirs, "iteration": 9}, tmp_path / "model.pth")
    info = import_detectron2(tmp_path / "model.pth", "cascade_mask_rcnn_r50_dcn_fpn", tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    assert len(ours) == len(theirs)
    assert torch.equal(
        ours["backbone.body.layer2.1.conv2.offset.weight"], theirs["backbone.bottom_up.res3.1.conv2_offset.weight"]
    )
    assert torch.equal(ours["stages.1.box_head.fc2.bias"], theirs["roi_heads.box_head.1.fc2.bias"])
    assert torch.equal(ours["stages.2.mask_head.convs.3.bias"], theirs["roi_heads.mask_head.mask_fcn4.bias"])
    config = preset_config(info.preset, 80, **info.overrides)
    assert config.average_probabilities and config.mask_stages == 1
    assert config.stage_delta_weights[2] == (30, 30, 15, 15)


@pytest.mark.parametrize(
    ("version", "kind", "preset"),
    [
        (2, "htc", "htc_r50_fpn"),
        pytest.param(1, "htc", "htc_r50_fpn", marks=pytest.mark.slow),
        (1, "mask_rcnn", "mask_rcnn_r50_fpn"),
        pytest.param(2, "cascade_mask_rcnn", "cascade_dsg_r50_fpn", marks=pytest.mark.slow),
    ],
)
def test_mmdetection(version, kind, preset, tmp_path):
    theirs = foreign_layouts.filled(foreign_layouts.mmdet(version, kind=kind))
    config_text = "model = dict(backbone=dict(type='ResNet', style='pytorch'))"
    torch.save({"meta": {"config": config_text, "epoch": 12}, "state_dict": theirs}, tmp_path / "model.pth")
    info = import_mmdet(tmp_path / "model.pth", preset, tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    roi = "roi_head." if version == 2 else ""
    weights = {name for name in theirs if not name.endswith("num_batches_tracked")}
    if kind == "htc":
        weights -= {f"{roi}mask_head.0.conv_res.conv.weight", f"{roi}mask_head.0.conv_res.conv.bias"}
        assert torch.equal(ours["stages.2.fuse_mask.conv.weight"], theirs[f"{roi}mask_head.2.conv_res.conv.weight"])
        assert torch.equal(ours["semantic.classifier.bias"], theirs[f"{roi}semantic_head.conv_logits.bias"])
    guided = "dsg" in preset
    assert len(ours) == len(weights) or guided
    config = preset_config(info.preset, 80, **info.overrides)
    box = "box_head" if kind == "mask_rcnn" else "stages.0.box_head"
    scores = theirs[f"{roi}bbox_head.{'' if kind == 'mask_rcnn' else '0.'}fc_cls.weight"]
    first = scores if version == 1 else torch.cat([scores[-1:], scores[:-1]])
    assert torch.equal(ours[f"{box}.classifier.weight"], first)
    assert (config.roi_aligned, config.roi_sampling_ratio) == ((False, 2) if version == 1 else (True, 0))
    assert (config.anchor_rounding, config.anchor_centre) == ((True, 0.5) if version == 1 else (False, 0.0))
    assert config.score_threshold == (0.001 if kind == "htc" else 0.05)
    assert config.semantic == ("stuff" if kind == "htc" else "off")
    if guided:
        assert float(ours["guidance_scale"]) == 0 and not ours["stages.0.fuse_box.conv.weight"].any()
        assert torch.equal(ours["mpn.convs.2.weight"], theirs["roi_head.mask_head.0.convs.2.conv.weight"])


def test_what_the_file_says_of_itself(tmp_path):
    shapes = foreign_layouts.mmdet(2, classes=2)
    meta = {"CLASSES": ("nut", "bolt"), "config": "backbone=dict(style='caffe')"}
    theirs = foreign_layouts.filled(shapes)
    torch.save({"meta": meta, "state_dict": theirs}, tmp_path / "model.pth")
    info = import_mmdet(tmp_path / "model.pth", "mask_rcnn_r50_fpn", tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    assert info.category_names == ["nut", "bolt"] and info.category_ids == [1, 2]
    assert torch.equal(ours["backbone.body.conv1.weight"], theirs["backbone.conv1.weight"].flip(1))
    assert info.overrides["stride_in_1x1"] and info.overrides["pixel_std"] == (1 / 255,) * 3


def test_anchors_of_mmdetection_1_by_hand():
    """Level of stride 4, ratio 0.5: base size 4, centre (1.5, 1.5), a width of 32 * sqrt(2) and half of it, inclusive
    corners rounded: (-21, -10, 24, 13); half open that is (-21, -10, 25, 14)."""
    from dsg.model.network.anchors import AnchorGenerator

    generator = AnchorGenerator(((32.0,),), (0.5, 1.0, 2.0), rounding=True, strides_from_grid=False, centre=0.5)
    (anchors,) = generator([torch.zeros(1, 1, 1, 2)], (4, 8), torch.float64)
    assert anchors[:3].tolist() == [[-21, -9, 25, 13], [-14, -14, 18, 18], [-9, -21, 13, 25]]
    assert (anchors[3:] - anchors[:3]).tolist() == [[4, 0, 4, 0]] * 3


@pytest.mark.parametrize("broken", ["truncated", "garbage", "empty", "code", "objects", "short array", "no dict"])
def test_a_broken_pickle_gives_one_line_and_runs_nothing(broken, tmp_path):
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return (exec, (f"open({str(ran)!r}, 'w')",))

    whole = pickle.dumps({"model": {"a": np.arange(100.0), "b": np.float32(1)}}, protocol=2)
    content = {
        "truncated": whole[: len(whole) // 2],
        "garbage": b"\x00\x01 no pickle",
        "empty": b"",
        "code": pickle.dumps({"model": {"a": np.zeros(2), "x": Code()}}),
        "objects": pickle.dumps({"model": {"a": np.array([1, "x", None], dtype=object)}}),
        "short array": whole.replace(b"Kd\x85", b"Kx\x85"),  # says 120 numbers, holds 100
        "no dict": pickle.dumps([1, 2]),
    }[broken]
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pkl") as error:
        read_foreign(path)
    assert "\n" not in str(error.value) and not ran.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_of_every_protocol_hold_the_same_arrays(protocol, tmp_path):
    arrays = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "half": np.arange(3, dtype=np.float16),
        "whole": np.arange(3),
        "none": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "n": 3}, protocol=protocol))
    found = read_foreign(path).tensors
    assert sys.modules["numpy"] is np and set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == torch.from_numpy(array.copy()).dtype
        assert np.array_equal(found[name].numpy(), array)


def test_a_file_of_another_network_gives_one_line(tmp_path):
    shapes = foreign_layouts.detectron2()
    few = {name: shape for name, shape in shapes.items() if "res5.2.conv3" not in name}
    cases = {
        "is missing in the file": few,
        "no place for tensor roi_heads.keypoint": shapes | {"roi_heads.keypoint_head.conv1.weight": (2, 2)},
        "no class scores": {name: shape for name, shape in shapes.items() if "cls_score" not in name},
        "wants": shapes | {"roi_heads.mask_head.mask_fcn2.bias": (255,)},
    }
    for message, changed in cases.items():
        torch.save(foreign_layouts.filled(changed), tmp_path / "model.pth")
        with pytest.raises(ValueError, match=message) as error:
            import_detectron2(tmp_path / "model.pth", "mask_rcnn_r50_fpn", tmp_path / "ours.safetensors")
        assert "\n" not in str(error.value) and not (tmp_path / "ours.safetensors").exists()
