"""Weights of mmdetection: Mask R-CNN, Cascade Mask R-CNN and HTC with FPN, as its versions 1 and 2 name and mean them.

Version 1 counts background first and has boxes with inclusive corners: (x1, y1, x2, y2) there is (x1, y1, x2 + 1,
y2 + 1) here, which makes its sizes, overlaps and RoIs ours without the half pixel, and centres its anchors in their
cells. Version 2 counts background last and has half-pixel aligned RoIs, sampled as densely as they are large. Both
average the logits of a cascade's stages and the masks of its heads.
"""

import os
from typing import Any

from torch import Tensor

from dsg.model.network.checkpoint import CheckpointInfo, Resize
from dsg.model.network.imported import (
    Imported,
    background_first,
    categories_of,
    outputs_of,
    refuse_unknown,
    rename,
    rgb_first,
    write_imported,
)
from dsg.model.network.presets import preset_config
from dsg.model.network.weight_files import read_foreign

_ROI = r"(?:roi_head\.)?"  # version 1 lacks it
_RENAMES = (
    (r"backbone\.(layer\d\.\d+)\.conv2(?:\.conv)?_offset\.(weight|bias)", r"backbone.body.\1.conv2.offset.\2"),
    (r"backbone\.(layer\d\.\d+)\.conv2\.conv_offset\.(weight|bias)", r"backbone.body.\1.conv2.offset.\2"),
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(.+)", r"backbone.pyramid.inner.\1.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(.+)", r"backbone.pyramid.outer.\1.\2"),
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn_head.conv.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn_head.objectness.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn_head.deltas.\1"),
    (rf"{_ROI}bbox_head\.shared_fcs\.0\.(.+)", r"box_head.fc1.\1"),
    (rf"{_ROI}bbox_head\.shared_fcs\.1\.(.+)", r"box_head.fc2.\1"),
    (rf"{_ROI}bbox_head\.fc_cls\.(.+)", r"box_head.classifier.\1"),
    (rf"{_ROI}bbox_head\.fc_reg\.(.+)", r"box_head.regressor.\1"),
    (rf"{_ROI}bbox_head\.(\d)\.shared_fcs\.0\.(.+)", r"stages.\1.box_head.fc1.\2"),
    (rf"{_ROI}bbox_head\.(\d)\.shared_fcs\.1\.(.+)", r"stages.\1.box_head.fc2.\2"),
    (rf"{_ROI}bbox_head\.(\d)\.fc_cls\.(.+)", r"stages.\1.box_head.classifier.\2"),
    (rf"{_ROI}bbox_head\.(\d)\.fc_reg\.(.+)", r"stages.\1.box_head.regressor.\2"),
    (rf"{_ROI}mask_head\.convs\.(\d)\.conv\.(.+)", r"mask_head.convs.\1.\2"),
    (rf"{_ROI}mask_head\.upsample\.(.+)", r"mask_head.deconv.\1"),
    (rf"{_ROI}mask_head\.conv_logits\.(.+)", r"mask_head.predictor.\1"),
    (rf"{_ROI}mask_head\.(\d)\.convs\.(\d)\.conv\.(.+)", r"stages.\1.mask_head.convs.\2.\3"),
    (rf"{_ROI}mask_head\.(\d)\.upsample\.(.+)", r"stages.\1.mask_head.deconv.\2"),
    (rf"{_ROI}mask_head\.(\d)\.conv_logits\.(.+)", r"stages.\1.mask_head.predictor.\2"),
    (rf"{_ROI}mask_head\.([1-9])\.conv_res\.conv\.(.+)", r"stages.\1.fuse_mask.conv.\2"),
    (rf"{_ROI}semantic_head\.lateral_convs\.(\d)\.conv\.(.+)", r"semantic.laterals.\1.\2"),
    (rf"{_ROI}semantic_head\.convs\.(\d)\.conv\.(.+)", r"semantic.convs.\1.\2"),
    (rf"{_ROI}semantic_head\.conv_embedding\.conv\.(.+)", r"semantic.embedding.\1"),
    (rf"{_ROI}semantic_head\.conv_logits\.(.+)", r"semantic.classifier.\1"),
)
# version 1 gives the first mask head of HTC a convolution for features of a head before it, and never runs it
_UNUSED = rf"{_ROI}mask_head\.0\.conv_res\.conv\.(weight|bias)"
_SHARED: dict[str, Any] = {"rpn_min_size": 0.0}
_VERSION_1: dict[str, Any] = {
    "roi_aligned": False,
    "roi_sampling_ratio": 2,
    "anchor_rounding": True,
    "anchor_centre": 0.5,
}
_VERSION_2: dict[str, Any] = {"roi_sampling_ratio": 0}
_CAFFE: dict[str, Any] = {  # pixels of BGR in 0..255 without a standard deviation, as RGB in 0..1
    "pixel_mean": (123.675 / 255, 116.28 / 255, 103.53 / 255),
    "pixel_std": (1 / 255, 1 / 255, 1 / 255),
    "stride_in_1x1": True,
}


def import_mmdet(
    path: str | os.PathLike[str], model_name: str, out: str | os.PathLike[str], bn_eps: float | None = None
) -> CheckpointInfo:
    """Convert a .pth of mmdetection 1 or 2, told apart by the names of its tensors.

    Args:
        path: the file. Names of classes, and whether the backbone is one of Caffe's (BGR, strides in the 1x1), are read
            from what the file says of itself; without it they are COCO's, and PyTorch's.
        model_name: the preset to fill, such as cascade_mask_rcnn_r50_fpn or htc_r50_fpn, or one with guidance, which
            starts from the file's predictions.
        out: checkpoint to write.
        bn_eps: epsilon of the batch norms; None is 1e-5.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or of another network than `model_name`.
    """
    found = read_foreign(path)
    is_version_2 = any(name.startswith("roi_head.") for name in found.tensors)
    tensors, unknown = rename(found.tensors, _RENAMES, _UNUSED)
    refuse_unknown(path, unknown, model_name, "mmdetection")
    outputs = outputs_of(path, tensors, "mmdetection")
    config = preset_config(model_name)
    is_htc = config.cascade and config.semantic != "off"
    overrides: dict[str, Any] = {
        **_SHARED,
        **(_VERSION_2 if is_version_2 else _VERSION_1),
        "norm_eps": 1e-5 if bn_eps is None else bn_eps,
        "score_threshold": 0.001 if is_htc else 0.05,
    }
    if is_version_2:
        tensors = background_first(tensors)
    settings = str(found.meta.get("config", ""))
    if "style='caffe'" in settings or 'style="caffe"' in settings:
        overrides |= _CAFFE
        tensors = rgb_first(tensors)
    if is_htc:
        overrides |= _semantic(tensors)
    names = found.meta.get("CLASSES") or ()
    imported = Imported(
        "mmdetection",
        tensors,
        categories_of(outputs - 1, [str(name) for name in names] if isinstance(names, list | tuple) else ()),
        overrides,
        Resize(800, 1333, antialias=False, rounding="nearest"),
        score_threshold=overrides["score_threshold"],
        paste="grid",
        notes={"mmdetection": "version 2" if is_version_2 else "version 1"},
    )
    return write_imported(path, model_name, out, imported)


def _semantic(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The branch as the file has it."""
    if "semantic.classifier.bias" not in tensors:
        return {"semantic": "off"}
    return {"semantic": "stuff", "semantic_classes": len(tensors["semantic.classifier.bias"])}
