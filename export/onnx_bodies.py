"""What the ops of dsg mean in standard operators of ONNX: bodies for a runtime that has no kernel of them.

Each body is a function of the model, written for the attributes of its node: functions of one op that differ in them
carry different `overload` names.

With S sampling points a bin and side, the op is exactly a RoIAlign of H * S x W * S bins with one point
each, times (1 + the map resized to that grid), averaged over S x S. Without a map it is a plain RoIAlign.

R RoIs, C channels, H x W the output, S sampling points, Hp x Wp the map, L levels.
"""

import math
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import helper, parser

from dsg.export.onnx_ops import DOMAIN


def add_bodies(model: onnx.ModelProto) -> None:
    """Give every node of `dsg` in the graph its body, as a function of the model."""
    overloads: dict[bytes, str] = {}
    opset = next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        key = _same_but_for_names(node)
        if key not in overloads:
            overloads[key] = f"variant_{len(overloads)}"
            model.functions.append(_body(node, overloads[key], opset))
        node.overload = overloads[key]


def _same_but_for_names(node: onnx.NodeProto) -> bytes:
    twin = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    twin.input.extend("x" if name else "" for name in node.input)
    twin.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    return twin.SerializeToString(deterministic=True)


def _body(node: onnx.NodeProto, overload: str, opset: int) -> onnx.FunctionProto:
    lines, inputs = _suppression(node) if node.op_type == "BatchedNms" else _pooling(node)
    text = (
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}", overload: "{overload}">\n'
        f"{node.op_type} ({', '.join(inputs)}) => (output)\n{{\n" + "\n".join(lines) + "\n}"
    )
    return parser.parse_function(text)


def _suppression(node: onnx.NodeProto) -> tuple[list[str], list[str]]:
    """Lines of a body, and the names of its inputs."""
    (threshold,) = (helper.get_attribute_value(attribute) for attribute in node.attribute)
    return [_SUPPRESS.format(threshold=repr(float(threshold)))], ["boxes", "groups", "valid"]


def _pooling(node: onnx.NodeProto) -> tuple[list[str], list[str]]:
    """Lines of a body, and the names of its inputs."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    levels = [f"features_{level}" for level in range(len(node.input) - 2)]
    scales = given.get("spatial_scales") or [given["spatial_scale"]]
    height, width, samples = given["output_height"], given["output_width"], given["sampling_ratio"]
    is_guided = bool(node.input[1])
    if is_guided and samples <= 0:
        raise ValueError(
            "a shape-guided op with adaptive sampling (sampling_ratio <= 0) has no ONNX body; use 1 or more"
        )
    bins = (height * samples, width * samples, 1) if is_guided else (height, width, samples)
    mode = "half_pixel" if given["aligned"] else "output_half_pixel"
    lines = [_PREPARE.format(images=levels[0])]
    thresholds = _level_areas(scales, given) if len(levels) > 1 else []
    lines.append("level_0 = Sub (image, image)")
    for index, area in enumerate(thresholds, 1):
        lines.append(_LEVEL.format(index=index, before=index - 1, area=repr(float(area))))
    for index, features in enumerate(levels):
        lines.append(
            _POOL.format(
                index=index, last=len(thresholds), features=features, scale=repr(float(scales[index])), mode=mode,
                height=bins[0], width=bins[1], ratio=bins[2],
            )
        )  # fmt: skip
    for name in ("pooled", "rows"):
        parts = ", ".join(f"{name}_{index}" for index in range(len(levels)))
        lines.append(f"all_{name} = Concat <axis = 0> ({parts})")
    if is_guided:
        lines.append(_GUIDE.format(height=bins[0], width=bins[1], samples=samples))
    lines.append(_FINISH.format(result="averaged" if is_guided else "all_pooled"))
    return lines, ["rois", "prob", *levels]


def _level_areas(scales: Sequence[float], given: dict[str, Any]) -> list[float]:
    """Areas from which on a RoI goes to level 1, 2, ..., as in dsg.ops."""
    first = math.floor(-math.log2(scales[0]) + 0.5)
    relative = [2.0 ** (first + index - given["canonical_level"]) - 1e-6 for index in range(1, len(scales))]
    return [(given["canonical_scale"] * max(value, 0.0)) ** 2 for value in relative]


# RoIs with a coordinate that is not finite or a batch index that is none become empty boxes, and zeros at the end.
_PREPARE = """
first = Constant <value_ints = [0]> ()
second = Constant <value_ints = [1]> ()
third = Constant <value_ints = [2]> ()
fifth = Constant <value_ints = [4]> ()
sixth = Constant <value_ints = [5]> ()
nil = Constant <value_float = 0.0> ()
unlike_itself = Sub (rois, rois)
is_number = Equal (unlike_itself, nil)
numbers = Cast <to = 6> (is_number)
least_number = ReduceMin <keepdims = 1> (numbers, second)
index = Slice (rois, first, second, second)
whole = Floor (index)
is_whole = Equal (index, whole)
is_low_enough_of = Shape <start = 0, end = 1> ({images})
images = Cast <to = 1> (is_low_enough_of)
is_low_enough = Less (index, images)
is_high_enough = GreaterOrEqual (index, nil)
in_batch = And (is_low_enough, is_high_enough)
is_index = And (in_batch, is_whole)
is_finite = Cast <to = 9> (least_number)
is_valid = And (is_index, is_finite)
safe = Where (is_valid, rois, nil)
boxes = Slice (safe, second, sixth, second)
index_alone = Slice (safe, first, second, second)
index_whole = Cast <to = 7> (index_alone)
image = Squeeze (index_whole, second)
corner_low = Slice (boxes, first, third, second)
corner_high = Slice (boxes, third, fifth, second)
sides = Sub (corner_high, corner_low)
area = ReduceProd <keepdims = 0> (sides, second)"""
_LEVEL = """
threshold_{index} = Constant <value_float = {area}> ()
reaches_{index} = GreaterOrEqual (area, threshold_{index})
step_{index} = Cast <to = 7> (reaches_{index})
level_{index} = Add (level_{before}, step_{index})"""
_POOL = """
number_{index} = Constant <value_int = {index}> ()
is_level_{index} = Equal (level_{last}, number_{index})
found_{index} = NonZero (is_level_{index})
rows_{index} = Squeeze (found_{index}, first)
boxes_{index} = Gather (boxes, rows_{index})
image_{index} = Gather (image, rows_{index})
wide_{index} = Cast <to = 1> ({features})
pooled_{index} = RoiAlign <coordinate_transformation_mode = "{mode}", mode = "avg", output_height = {height},
    output_width = {width}, sampling_ratio = {ratio}, spatial_scale = {scale}>
    (wide_{index}, boxes_{index}, image_{index})"""
_GUIDE = """
own_maps = Gather (prob, all_rows)
wide_maps = Cast <to = 1> (own_maps)
maps = Unsqueeze (wide_maps, second)
count = Shape <start = 0, end = 1> (maps)
grid = Constant <value_ints = [1, {height}, {width}]> ()
grid_size = Concat <axis = 0> (count, grid)
resized = Resize <coordinate_transformation_mode = "half_pixel", mode = "linear"> (maps, , , grid_size)
one = Constant <value_float = 1.0> ()
weights = Add (resized, one)
weighed = Mul (all_pooled, weights)
averaged = AveragePool <kernel_shape = [{samples}, {samples}], strides = [{samples}, {samples}]> (weighed)"""
# The RoIs were pooled level by level: back into their own order.
_FINISH = """
total = Size (all_rows)
start = Constant <value_int = 0> ()
step = Constant <value_int = 1> ()
order = Range (start, total, step)
place = ScatterElements <axis = 0> (all_rows, all_rows, order)
ordered = Gather ({result}, place)
four_axes = Constant <value_ints = [2, 3]> ()
is_valid_bin = Unsqueeze (is_valid, four_axes)
finished = Where (is_valid_bin, ordered, nil)
output = CastLike (finished, features_0)"""
_SUPPRESS = """
group = Cast <to = 1> (groups)
one = Constant <value_float = 1.0> ()
highest = ReduceMax <keepdims = 0> (group)
places = Add (highest, one)
root = Sqrt (places)
side = Ceil (root)
quotient = Div (group, side)
row = Floor (quotient)
before = Mul (row, side)
column = Sub (group, before)
third_axis = Constant <value_ints = [2]> ()
column_alone = Unsqueeze (column, third_axis)
row_alone = Unsqueeze (row, third_axis)
from_corner = Concat <axis = 2> (column_alone, row_alone)
half = Constant <value_float = 0.5> ()
half_side = Mul (side, half)
middle = Floor (half_side)
cell = Sub (from_corner, middle)
distances = Abs (boxes)
axes_of_image = Constant <value_ints = [1, 2]> ()
furthest = ReduceMax <keepdims = 1> (distances, axes_of_image)
reach = Add (furthest, one)
move = Mul (cell, reach)
moves = Concat <axis = 2> (move, move)
apart = Add (boxes, moves)
count = Shape <start = 1, end = 2> (groups)
most = Squeeze (count)
last = Constant <value_int = 0> ()
step = Constant <value_int = -1> ()
falling = Range (most, last, step)
rank = Cast <to = 1> (falling)
below_all = Constant <value_float = -1.0> ()
scores = Where (valid, rank, below_all)
second_axis = Constant <value_ints = [1]> ()
scores_of_class = Unsqueeze (scores, second_axis)
threshold = Constant <value_floats = [{threshold}]> ()
least = Constant <value_floats = [0.0]> ()
chosen = NonMaxSuppression (apart, scores_of_class, count, threshold, least)
image_and_box = Constant <value_ints = [0, 2]> ()
place = Gather <axis = 1> (chosen, image_and_box)
mark = Constant <value_int = 1> ()
number = Shape <start = 0, end = 1> (place)
marks = Expand (mark, number)
nothing = Sub (groups, groups)
marked = ScatterND (nothing, place, marks)
output = Cast <to = 9> (marked)"""
