"""Weights of detectron2's model zoo: Mask R-CNN and Cascade Mask R-CNN with FPN.

Its pixels are BGR in 0..255, strides of R-50 and R-101 sit in the 1x1 convolutions, background is the last class, RoIs
are half-pixel aligned and sampled as densely as they are large, a cascade averages probabilities and has one mask head
on the final boxes, pictures are shrunk with a low-pass, masks are pasted at pixel centres. All of that goes into the
checkpoint.
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

_BODY = r"backbone\.bottom_up\."
# theirs -> ours; stages are counted from res2 there and from layer1 here
_RENAMES = (
    (rf"{_BODY}stem\.conv1\.weight", r"backbone.body.conv1.weight"),
    (rf"{_BODY}stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    *(
        rule
        for stage in (2, 3, 4, 5)
        for rule in (
            (rf"{_BODY}res{stage}\.(\d+)\.conv([123])\.weight", rf"backbone.body.layer{stage - 1}.\1.conv\2.weight"),
            (rf"{_BODY}res{stage}\.(\d+)\.conv([123])\.norm\.(.+)", rf"backbone.body.layer{stage - 1}.\1.bn\2.\3"),
            (rf"{_BODY}res{stage}\.(\d+)\.conv2_offset\.(.+)", rf"backbone.body.layer{stage - 1}.\1.conv2.offset.\2"),
            (rf"{_BODY}res{stage}\.0\.shortcut\.weight", rf"backbone.body.layer{stage - 1}.0.downsample.0.weight"),
            (rf"{_BODY}res{stage}\.0\.shortcut\.norm\.(.+)", rf"backbone.body.layer{stage - 1}.0.downsample.1.\1"),
            (rf"backbone\.fpn_lateral{stage}\.(weight|bias)", rf"backbone.pyramid.inner.{stage - 2}.\1"),
            (rf"backbone\.fpn_output{stage}\.(weight|bias)", rf"backbone.pyramid.outer.{stage - 2}.\1"),
        )
    ),
    (r"proposal_generator\.rpn_head\.conv\.(weight|bias)", r"rpn_head.conv.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(.+)", r"rpn_head.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(.+)", r"rpn_head.deltas.\1"),
    (r"roi_heads\.box_head\.fc([12])\.(.+)", r"box_head.fc\1.\2"),
    (r"roi_heads\.box_predictor\.cls_score\.(.+)", r"box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.+)", r"box_head.regressor.\1"),
    (r"roi_heads\.box_head\.(\d)\.fc([12])\.(.+)", r"stages.\1.box_head.fc\2.\3"),
    (r"roi_heads\.box_predictor\.(\d)\.cls_score\.(.+)", r"stages.\1.box_head.classifier.\2"),
    (r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.(.+)", r"stages.\1.box_head.regressor.\2"),
    *((rf"roi_heads\.mask_head\.mask_fcn{n}\.(weight|bias)", rf"mask_head.convs.{n - 1}.\1") for n in (1, 2, 3, 4)),
    (r"roi_heads\.mask_head\.deconv\.(.+)", r"mask_head.deconv.\1"),
    (r"roi_heads\.mask_head\.predictor\.(.+)", r"mask_head.predictor.\1"),
)
_NOT_WEIGHTS = r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+"
_MEAN_BGR = (103.53, 116.28, 123.675)
_X101_STD_BGR = (57.375, 57.12, 58.395)
_CONVENTIONS: dict[str, Any] = {
    "roi_sampling_ratio": 0,
    "rpn_min_size": 0.0,
    "score_threshold": 0.05,
}
_CASCADE: dict[str, Any] = {
    "mask_stages": 1,
    "average_probabilities": True,
    "stage_delta_weights": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
}


def import_detectron2(
    path: str | os.PathLike[str], model_name: str, out: str | os.PathLike[str], bn_eps: float | None = None
) -> CheckpointInfo:
    """Convert a .pkl of the model zoo, or a .pth that detectron2's checkpointer wrote.

    Args:
        path: the file.
        model_name: the preset to fill, such as mask_rcnn_r50_fpn, cascade_mask_rcnn_r50_fpn, or one with guidance,
            which starts from the file's predictions.
        out: checkpoint to write.
        bn_eps: epsilon of the batch norms; None is detectron2's 1e-5.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or of another network than `model_name`.
    """
    theirs = read_foreign(path).tensors
    tensors, unknown = rename(theirs, _RENAMES, _NOT_WEIGHTS)
    refuse_unknown(path, unknown, model_name, "detectron2")
    outputs = outputs_of(path, tensors, "detectron2")
    tensors = rgb_first(background_first(tensors))
    config = preset_config(model_name)
    overrides = {
        **_CONVENTIONS,
        **_pixels(theirs, config.backbone),
        "norm_eps": 1e-5 if bn_eps is None else bn_eps,
        "stride_in_1x1": config.backbone in ("resnet50", "resnet101"),
    }
    if config.cascade:
        overrides |= _CASCADE
        last = len(_CASCADE["stage_delta_weights"]) - 1
        tensors = {
            f"stages.{last}.{name}" if name.startswith("mask_head.") else name: tensor
            for name, tensor in tensors.items()
        }
    imported = Imported(
        "detectron2",
        tensors,
        categories_of(outputs - 1),
        overrides,
        Resize(800, 1333, rounding="nearest"),
        paste="grid",
    )
    return write_imported(path, model_name, out, imported)


def _pixels(theirs: dict[str, Tensor], backbone: str) -> dict[str, Any]:
    """Statistics of BGR in 0..255 as those of RGB in 0..1. Files that lack them are of the zoo, where only the ResNeXts
    divide by a standard deviation."""
    mean = theirs["pixel_mean"].flatten().tolist() if "pixel_mean" in theirs else _MEAN_BGR
    std = (1.0, 1.0, 1.0) if backbone in ("resnet50", "resnet101") else _X101_STD_BGR
    if "pixel_std" in theirs:
        std = tuple(theirs["pixel_std"].flatten().tolist())
    return {
        "pixel_mean": tuple(value / 255 for value in reversed(list(mean))),
        "pixel_std": tuple(value / 255 for value in reversed(list(std))),
    }
