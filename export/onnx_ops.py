"""The ops of dsg in ONNX: what torch.onnx.export is told.

`dsg::SgRoIAlign` and `dsg::MultiScaleSgRoIAlign` are nodes of their own, so that native kernels can take them;
`onnx_bodies.add_bodies` gives the model what they mean in standard operators.

B images, N boxes of an image, M of all that stay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
import torchvision  # noqa: F401  registers its deformable convolution
from onnx import helper
from onnxscript import FLOAT, INT64, opset18, opset19
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


def _batched_nms(boxes: FLOAT, groups: INT64, valid: Any, threshold: float) -> Any:
    """One NonMaxSuppression for all images and groups: boxes of different groups are moved to different places.

    The places form a square grid around the origin, so that coordinates stay small and float32 keeps their fractions.
    """
    op = _OP
    group = op.Cast(groups, to=onnx.TensorProto.FLOAT)  # [B, N]
    side = op.Ceil(op.Sqrt(op.ReduceMax(group, keepdims=0) + 1.0))
    row = op.Floor(op.Div(group, side))
    column = group - row * side
    last = op.Constant(value_ints=[2])
    # [B, N, 2], from -side / 2 to side / 2
    cell = op.Concat(op.Unsqueeze(column, last), op.Unsqueeze(row, last), axis=2) - op.Floor(side * 0.5)
    reach = op.ReduceMax(op.Abs(boxes), op.Constant(value_ints=[1, 2]), keepdims=1) + 1.0  # [B, 1, 1]
    moves = cell * reach
    apart = boxes + op.Concat(moves, moves, axis=2)  # [B, N, 4]
    count = op.Shape(groups, start=1, end=2)  # [1]: N
    scalar = op.Squeeze(count)
    falling = op.Range(scalar, op.Constant(value_int=0), op.Constant(value_int=-1))  # [N]: the boxes come best first
    scores = op.Where(valid, op.Cast(falling, to=onnx.TensorProto.FLOAT), op.Constant(value_float=-1.0))  # [B, N]
    chosen = op.NonMaxSuppression(
        apart,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        count,
        op.Constant(value_floats=[threshold]),
        op.Constant(value_floats=[0.0]),
    )  # [M, 3]: image, class (always 0), box
    place = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # [M, 2]
    ones = op.Expand(op.Constant(value_int=1), op.Shape(place, start=0, end=1))  # [M]
    kept = op.ScatterND(op.ConstantOfShape(op.Shape(groups), value=_INT_ZERO), place, ones)  # [B, N]
    return op.Cast(kept, to=onnx.TensorProto.BOOL)


_INT_ZERO = helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0])


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
