"""The ops of dsg in ONNX: what torch.onnx.export is told.

`dsg::SgRoIAlign`, `dsg::MultiScaleSgRoIAlign` and `dsg::BatchedNms` are nodes of their own, so that native kernels can
take them; `onnx_bodies.add_bodies` gives the model what they mean in standard operators.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
import torchvision  # noqa: F401  registers its deformable convolution
from onnxscript import opset18, opset19
from onnxscript.values import Op, Opset

DOMAIN = "dsg"
OPSET = 18
DEFORMABLE_OPSET = 19
"""The first with DeformConv."""
_MAX_LEVELS = 8
_DSG = Opset(DOMAIN, 1)
_OP: Any = opset18  # typed more narrowly than it is used: an operator on symbols


def _schema(name: str, levels: int, attributes: dict[str, onnx.defs.OpSchema.AttrType]) -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    features = ["features"] if levels == 1 else [f"features_{level}" for level in range(levels)]
    return schema(
        name,
        DOMAIN,
        1,
        inputs=[
            schema.FormalParameter("rois", "tensor(float)"),
            schema.FormalParameter("prob", "T", param_option=optional),
            schema.FormalParameter(features[0], "T"),
            *(schema.FormalParameter(level, "T", param_option=optional) for level in features[1:]),
        ],
        outputs=[schema.FormalParameter("pooled", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "features, map and output")],
        attributes=[schema.Attribute(name, kind) for name, kind in attributes.items()],
    )


_INT, _FLOAT, _FLOATS = (getattr(onnx.defs.OpSchema.AttrType, name) for name in ("INT", "FLOAT", "FLOATS"))
_SIZES = {"output_height": _INT, "output_width": _INT, "sampling_ratio": _INT, "aligned": _INT}
_ONE = Op(_DSG, "SgRoIAlign", _schema("SgRoIAlign", 1, {**_SIZES, "spatial_scale": _FLOAT}))
_MANY = Op(
    _DSG,
    "MultiScaleSgRoIAlign",
    _schema(
        "MultiScaleSgRoIAlign",
        _MAX_LEVELS,
        {**_SIZES, "spatial_scales": _FLOATS, "canonical_scale": _FLOAT, "canonical_level": _INT},
    ),
)


_NMS = Op(
    _DSG,
    "BatchedNms",
    onnx.defs.OpSchema(
        "BatchedNms",
        DOMAIN,
        1,
        inputs=[
            onnx.defs.OpSchema.FormalParameter("boxes", "tensor(float)"),
            onnx.defs.OpSchema.FormalParameter("groups", "tensor(int64)"),
            onnx.defs.OpSchema.FormalParameter("valid", "tensor(bool)"),
        ],
        outputs=[onnx.defs.OpSchema.FormalParameter("kept", "tensor(bool)")],
        attributes=[onnx.defs.OpSchema.Attribute("threshold", _FLOAT)],
    ),
)


def translations() -> dict[Any, Callable[..., Any]]:
    """For `custom_translation_table` of torch.onnx.export: the ops of dsg, and two of others that it does not know."""
    return {
        torch.ops.dsg.sg_roi_align.default: _sg_roi_align,
        torch.ops.dsg.multiscale_sg_roi_align.default: _multiscale_sg_roi_align,
        torch.ops.dsg.batched_nms.default: _batched_nms,
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.torchvision.deform_conv2d.default: _deform_conv2d,
    }


def opset_of(program: torch.export.ExportedProgram) -> int:
    """The version of ONNX's operators that a program needs."""
    deforms = any(node.target is torch.ops.torchvision.deform_conv2d.default for node in program.graph.nodes)
    return DEFORMABLE_OPSET if deforms else OPSET


def _sg_roi_align(
    features: Any, rois: Any, prob: Any, height: int, width: int, scale: float, ratio: int, aligned: bool
) -> Any:
    return _ONE(
        rois,
        prob,
        features,
        output_height=height,
        output_width=width,
        sampling_ratio=ratio,
        aligned=int(aligned),
        spatial_scale=scale,
    )


def _multiscale_sg_roi_align(
    features: Sequence[Any],
    rois: Any,
    prob: Any,
    height: int,
    width: int,
    scales: Sequence[float],
    ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Any:
    return _MANY(
        rois,
        prob,
        *features,
        output_height=height,
        output_width=width,
        sampling_ratio=ratio,
        aligned=int(aligned),
        spatial_scales=list(scales),
        canonical_scale=canonical_scale,
        canonical_level=canonical_level,
    )


def _batched_nms(boxes: Any, groups: Any, valid: Any, threshold: float) -> Any:
    return _NMS(boxes, groups, valid, threshold=threshold)


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK puts the lower index first where values are equal: a stable sort, when it takes them all."""
    count = _OP.Shape(values, start=dim, end=dim + 1 or None)
    return _OP.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _deform_conv2d(
    features: Any,
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    dilation_y: int,
    dilation_x: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    return opset19.DeformConv(
        features,
        weight,
        offset,
        bias,
        mask if use_mask else None,
        strides=[stride_y, stride_x],
        pads=[pad_y, pad_x, pad_y, pad_x],
        dilations=[dilation_y, dilation_x],
        group=groups,
        offset_group=offset_groups,
    )
