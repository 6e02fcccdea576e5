"""Weights of torchvision's Mask R-CNN into a checkpoint that predicts what the original predicts.

Names of tensors differ, and so do conventions: RoI coordinates without the half pixel, rounded anchors whose stride is
taken from the grid, a resize without low-pass, the score floor. All of them go into the checkpoint.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dsg.model.network.build import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint
from dsg.model.network.coco_classes import COCO80, COCO90
from dsg.model.network.weight_files import read_state_dict

# ours <- theirs, as regular expressions on torchvision's names; old files lack the ".0" of some layers
_RENAMES = (
    (r"backbone\.body\.(.+)", r"backbone.body.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"backbone.pyramid.inner.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"backbone.pyramid.outer.\1.\2"),
    (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn_head.conv.\1"),
    (r"rpn\.head\.cls_logits\.(.+)", r"rpn_head.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(.+)", r"rpn_head.deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(.+)", r"box_head.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(.+)", r"box_head.fc2.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.+)", r"box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.+)", r"box_head.regressor.\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(weight|bias)", r"mask_head.convs.\1.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.+)", r"mask_head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.+)", r"mask_head.predictor.\1"),
)
_COUNTER = ".num_batches_tracked"
_CONVENTIONS = {
    "roi_aligned": False,
    "anchor_rounding": True,
    "anchor_strides_from_grid": True,
    "box_smooth_l1_beta": 1 / 9,
    "score_threshold": 0.05,
}


def import_torchvision(
    path: str | os.PathLike[str],
    model_name: str,
    out: str | os.PathLike[str],
    classes: str | None = None,
    bn_eps: float | None = None,
) -> CheckpointInfo:
    """Convert a state dict file of `torchvision.models.detection.maskrcnn_resnet50_fpn`.

    Args:
        path: what `torch.save(model.state_dict(), path)` wrote, or the same tensors as safetensors.
        model_name: the preset to fill; its tensors must be those of the file.
        out: checkpoint to write.
        classes: None keeps every output of the file; "coco80" keeps background and the 80 used COCO ids of a file with
            91 outputs, which moves scores a little, since the softmax has fewer terms.
        bn_eps: epsilon of the batch norms; None takes 1e-5 for a file with batch norm counters, else 0, as the norms
            of torchvision's COCO weights have it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a state dict, or of another network than `model_name`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    theirs = read_state_dict(path)
    tensors, unknown = _rename(theirs)
    if unknown:
        raise ValueError(
            f"{path}: no place for tensor {unknown[0]} in {model_name}; is it a Mask R-CNN of torchvision?"
        )
    if "box_head.classifier.bias" not in tensors:
        raise ValueError(
            f"{path}: it has no roi_heads.box_predictor.cls_score.bias; is it a Mask R-CNN of torchvision?"
        )
    categories = _categories(str(path), len(tensors["box_head.classifier.bias"]), classes)
    if classes == "coco80":
        tensors = _keep_outputs(tensors, [0, *(category.id for category in categories)])
    if bn_eps is None:
        bn_eps = 1e-5 if any(name.endswith(_COUNTER) for name in theirs) else 0.0
    overrides: dict[str, Any] = {**_CONVENTIONS, "norm_eps": bn_eps}
    model = build(model_name, len(categories), **overrides)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name} of {model_name} is missing in the file")
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path}: tensor {name} is {found}, {model_name} wants {expected}")
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        raise ValueError(f"{path}: no place for tensor {extra[0]} in {model_name}; choose another --model")
    model.load_state_dict(tensors)
    info = CheckpointInfo(
        name=Path(out).stem,
        preset=model_name,
        overrides=overrides,
        categories=categories,
        resize=Resize(800, 1333, antialias=False),
        score_threshold=0.05,
        eval_score_threshold=0.05,
        max_detections=100,
        licence="as the imported file",
        notes={"imported": f"torchvision state dict {Path(path).name}"},
    )
    return save_checkpoint(out, model, info)


def _rename(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of theirs that fit no rule."""
    tensors, unknown = {}, []
    for name, tensor in theirs.items():
        if name.endswith(_COUNTER):
            continue
        for pattern, replacement in _RENAMES:
            if re.fullmatch(pattern, name):
                tensors[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            unknown.append(name)
    return tensors, unknown


def _categories(where: str, outputs: int, classes: str | None) -> tuple[Category, ...]:
    if classes not in (None, "coco80"):
        raise ValueError(f"classes must be coco80 or left out, got {classes!r}")
    if classes == "coco80":
        if outputs != 91:
            raise ValueError(
                f"{where}: coco80 needs the 91 outputs of torchvision's COCO weights, the file has {outputs}"
            )
        return COCO80
    if outputs == 91:
        return COCO90
    return tuple(Category(number, f"class {number}") for number in range(1, outputs))


def _keep_outputs(tensors: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Only these classes (0 is background) in the three layers that have one output, or four, a class."""
    kept = dict(tensors)
    for part in ("weight", "bias"):
        for layer in ("box_head.classifier", "mask_head.predictor"):
            kept[f"{layer}.{part}"] = tensors[f"{layer}.{part}"][rows]
        by_class = tensors[f"box_head.regressor.{part}"].unflatten(0, (-1, 4))  # [classes, 4, ...]
        kept[f"box_head.regressor.{part}"] = by_class[rows].flatten(0, 1)
    return kept
