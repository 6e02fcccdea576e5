"""Weights of torchvision's Mask R-CNN, both recipes, into a checkpoint that predicts what the original predicts.

Names of tensors differ, and so do conventions: RoI coordinates without the half pixel, rounded anchors whose stride is
taken from the grid, a resize without low-pass, the score floor. All of them go into the checkpoint.
"""

import os
from typing import Any

from torch import Tensor

from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize
from dsg.model.network.coco_classes import COCO80, COCO90
from dsg.model.network.imported import COUNTER, Imported, outputs_of, refuse_unknown, rename, write_imported
from dsg.model.network.weight_files import read_foreign

# theirs -> ours, as regular expressions; old files lack the ".0" of some layers, and the second recipe has norms at .1
_NORM = r"(weight|bias|running_mean|running_var)"
_RENAMES = (
    (r"backbone\.body\.(.+)", r"backbone.body.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"backbone.pyramid.inner.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"backbone.pyramid.outer.\1.\2"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.1\.{_NORM}", r"backbone.pyramid.inner_norms.\1.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.1\.{_NORM}", r"backbone.pyramid.outer_norms.\1.\2"),
    (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn_head.conv.\1"),
    (r"rpn\.head\.conv\.1\.0\.(weight|bias)", r"rpn_head.further.0.\1"),
    (r"rpn\.head\.cls_logits\.(.+)", r"rpn_head.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(.+)", r"rpn_head.deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(.+)", r"box_head.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(.+)", r"box_head.fc2.\1"),
    (r"roi_heads\.box_head\.([0-3])\.0\.weight", r"box_head.convs.\1.weight"),
    (rf"roi_heads\.box_head\.([0-3])\.1\.{_NORM}", r"box_head.norms.\1.\2"),
    (r"roi_heads\.box_head\.5\.(weight|bias)", r"box_head.fc1.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.+)", r"box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.+)", r"box_head.regressor.\1"),
    (r"roi_heads\.mask_head\.([0-3])\.0\.(weight|bias)", r"mask_head.convs.\1.\2"),
    (rf"roi_heads\.mask_head\.([0-3])\.1\.{_NORM}", r"mask_head.norms.\1.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.+)", r"mask_head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.+)", r"mask_head.predictor.\1"),
)
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
    """Convert a state dict file of `torchvision.models.detection.maskrcnn_resnet50_fpn` or `_v2`.

    Args:
        path: what `torch.save(model.state_dict(), path)` wrote, or the same tensors as safetensors.
        model_name: the preset to fill, mask_rcnn_r50_v2_fpn for the second recipe; its tensors must be those of the
            file. With guidance (dsg_r50_fpn) it starts from the file's predictions.
        out: checkpoint to write.
        classes: None keeps every output of the file; "coco80" keeps background and the 80 used COCO ids of a file with
            91 outputs, which moves scores a little, since the softmax has fewer terms.
        bn_eps: epsilon of the batch norms; None takes 1e-5 for a file with batch norm counters, else 0, as the norms
            of torchvision's COCO weights have it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a state dict, or of another network than `model_name`.
    """
    theirs = read_foreign(path).tensors
    tensors, unknown = rename(theirs, _RENAMES)
    refuse_unknown(path, unknown, model_name, "torchvision")
    categories = _categories(str(path), outputs_of(path, tensors, "torchvision"), classes)
    if classes == "coco80":
        tensors = _keep_outputs(tensors, [0, *(category.id for category in categories)])
    if bn_eps is None:
        bn_eps = 1e-5 if any(name.endswith(COUNTER) for name in theirs) else 0.0
    overrides: dict[str, Any] = {**_CONVENTIONS, "norm_eps": bn_eps}
    imported = Imported("torchvision", tensors, categories, overrides, Resize(800, 1333, antialias=False))
    return write_imported(path, model_name, out, imported)


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
