"""One writer a format: from the graph to a file without a contract. Each says which custom operators it uses."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from dsg.export.contract import INPUTS, OUTPUTS
from dsg.export.graph import ExportGraph, example, record


def write_onnx(graph: ExportGraph, path: Path, device: torch.device) -> tuple[str, ...]:
    """An ONNX file with the bodies of our ops, checked by onnx, its shapes inferred."""
    import onnx

    from dsg.export.onnx_bodies import add_bodies
    from dsg.export.onnx_ops import opset_of, translations

    recorded = record(graph, device)
    program = torch.onnx.export(
        recorded,
        opset_version=opset_of(recorded),
        dynamo=True,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        custom_translation_table=translations(),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _name_sizes(model)
    add_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True), path)
    return tuple(sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain}))


def _name_sizes(model: "onnx.ModelProto") -> None:  # type: ignore[name-defined]  # noqa: F821
    """The exporter calls the dynamic sizes s34 or the like, and adds notes of its own to everything."""
    images = next(given for given in model.graph.input if given.name == "images")
    own = [dim.dim_param for dim in images.type.tensor_type.shape.dim]
    names = {name: new for name, new in zip(own, ("batch", "", "height", "width"), strict=True) if name}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    # what lies between is inferred anew
    del model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]


def write_torchscript(graph: ExportGraph, path: Path, device: torch.device) -> tuple[str, ...]:
    """A TorchScript file that runs on any device, whichever it was traced on."""
    graph = graph.to(device)
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecated upstream (docs/export.md says so); and the tracer warns of comparisons of sizes that are
        # the same for every picture: numbers of proposals and candidates.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, example(device), check_trace=False)
        frozen = torch.jit.freeze(traced.eval())
        _follow_images(frozen)
        _part_lists(frozen)
        torch.jit.save(frozen, path)
    kinds = set(re.findall(r"\b(\w+::\w+)[\[(]", str(frozen.graph)))
    return tuple(sorted(kind for kind in kinds if kind.partition("::")[0] not in ("aten", "prim")))


def _follow_images(program: torch.jit.ScriptModule) -> None:
    """New tensors are made where the images lie: the tracer writes down the device that it saw."""
    graph: Any = program.graph  # a C++ class whose Python face is typed in part
    images = list(graph.inputs())[1]
    first = next(iter(graph.nodes()))
    constants = [
        node
        for node in graph.findAllNodes("prim::Constant", recurse=True)
        if node.output().type().kind() == "DeviceObjType"
    ]
    if not constants:
        return
    own_device = graph.create("prim::device", [images])
    own_device.insertBefore(first)
    own_device.output().setType(constants[0].output().type())
    for constant in constants:
        constant.output().replaceAllUsesWith(own_device.output())


def _part_lists(program: torch.jit.ScriptModule) -> None:
    """A list of features of its own for each call of our op.

    PyTorch moves the tensors out of a list that it hands to an op of a library, so the list can be used once; and its
    optimizer makes one of lists of the same tensors. A tensor detached once more is another one to it, and no copy.
    """
    graph: Any = program.graph
    calls = [*graph.findAllNodes("dsg::multiscale_sg_roi_align", recurse=True)]
    for times, call in enumerate(calls):
        features = next(iter(call.inputs())).node()
        assert features.kind() == "prim::ListConstruct"
        for number, tensor in enumerate([*features.inputs()]):
            for _ in range(times):
                node = graph.create("aten::detach", [tensor])
                node.insertBefore(features)
                tensor = node.output()
            features.replaceInput(number, tensor)


def write_aoti(graph: ExportGraph, path: Path, device: torch.device) -> tuple[str, ...]:
    """A package compiled for this device: minutes of work for a C++ compiler, on a GPU for Triton."""
    program = record(graph, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about its own tuning
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    names = {node.target.name() for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return tuple(sorted(name.partition(".")[0] for name in names if not name.startswith("aten::")))
