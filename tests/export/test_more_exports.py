"""Exports that take long: other networks, float16, the compiled package; and all formats on a GPU."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

import dsg.export
import dsg.model
from dsg.export.container import read_contract
from dsg.export.contract import ExportError, Format
from dsg.export.graph import ExportGraph
from dsg.export.onnx_bodies import add_bodies
from dsg.export.onnx_ops import OPSET, translations
from dsg.export.onnx_runtime import OnnxNetwork
from dsg.export.op_library import OP_LIBRARY
from dsg.export.writing import export
from dsg.model.network.float32 import whole_float32

needs_cuda_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA"
)


def agree(path: Path, checkpoint: Path, pictures: list[np.ndarray], device: str, atol: float = 1e-2) -> None:
    """Nearly all detections have their equal; not all, nor in order: scores of random weights tie to the last bit."""
    wanted = dsg.model.load(checkpoint, device, "float32").predict(pictures, 0.3)
    found = dsg.export.load(path, device).predict(pictures, 0.3)
    assert sum(map(len, wanted)) > 10 and [*map(len, found)] == [*map(len, wanted)]
    alike = [
        any((torch.as_tensor(box).cpu() - mine).abs().max() <= atol for box in other.boxes[other.labels == label])
        for one, other in zip(wanted, found, strict=True)
        for mine, label in zip(one.boxes.cpu(), one.labels.tolist(), strict=True)
    ]
    assert np.mean(alike) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mask_rcnn_lite0_fpn", "dsg_r50_fpn"])
@pytest.mark.parametrize("kind", [Format.ONNX, Format.TORCHSCRIPT])
def test_other_networks(preset, kind, make_checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    checkpoint = make_checkpoint(tmp_path / "random.safetensors", preset)
    agree(export(checkpoint, kind, tmp_path, device="cpu"), checkpoint, pictures, "cpu")


@pytest.mark.slow
def test_the_rejected_design_and_class_agnostic_masks(make_checkpoint, pictures, tmp_path):
    overrides = {"sgra_mask": True, "mask_per_class": False, "fuse_kernel": 1, "roi_aligned": False}
    checkpoint = make_checkpoint(tmp_path / "random.safetensors", "dsg_lite0_fpn", **overrides)
    agree(export(checkpoint, Format.ONNX, tmp_path, device="cpu"), checkpoint, pictures, "cpu")


@pytest.mark.slow
def test_adaptive_sampling_with_guidance_is_refused_for_onnx(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "random.safetensors", "dsg_lite0_fpn", roi_sampling_ratio=0)
    with pytest.raises(ExportError, match=r"random has no onnx export: .* use 1 or more"):
        export(checkpoint, Format.ONNX, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Format.ONNX, Format.TORCHSCRIPT])
def test_half_precision(kind, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    said: list[str] = []
    path = export(checkpoint, kind, tmp_path, device="cpu", half=True, say=said.append)
    assert read_contract(path).precision == "float16"
    assert path.stat().st_size < 0.62 * export(checkpoint, kind, tmp_path / "full", device="cpu").stat().st_size
    assert any("in float16 against itself in float32" in line for line in said)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_compiled_package_in_half_precision(checkpoint, tmp_path):
    said: list[str] = []
    path = export(checkpoint, Format.AOTI, tmp_path, device="cpu", half=True, say=said.append)
    assert (read_contract(path).precision, read_contract(path).device) == ("float16", "cpu")
    assert any("in float16 against itself in float32" in line for line in said)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_compiled_package(checkpoint, pictures, tmp_path, monkeypatch):
    path = export(checkpoint, Format.AOTI, tmp_path, device="cpu")
    with pytest.raises(ExportError, match="DSG_TRUST_CODE=1"):
        dsg.export.load(path)
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    assert read_contract(path).device == "cpu"
    agree(path, checkpoint, pictures, "cpu")
    with pytest.raises(ValueError, match="was compiled for cpu" if torch.cuda.is_available() else "not there"):
        dsg.export.load(path, "cuda")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ExportError, match="cut short or damaged"):
        dsg.export.load(path)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("half", [False, True])
def test_compiled_package_on_a_gpu(half, checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    path = export(checkpoint, Format.AOTI, tmp_path, device="cuda", half=half)
    assert read_contract(path).device == "cuda"
    if not half:
        agree(path, checkpoint, pictures, "cuda", atol=0.1)


@pytest.mark.gpu
def test_torchscript_traced_on_a_cpu_runs_on_a_gpu(torchscript_file, checkpoint, pictures, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    agree(torchscript_file.path, checkpoint, pictures, "cuda", atol=0.1)


@pytest.mark.gpu
@needs_cuda_provider
@pytest.mark.parametrize("with_library", [False, True])
def test_onnx_on_a_gpu(with_library, onnx_file, checkpoint, pictures, tmp_path):
    if with_library and not OP_LIBRARY.is_file():
        pytest.skip("the library is not built here")
    network = OnnxNetwork(onnx_file.path, "cuda", with_library, profile=str(tmp_path / "profile"))
    images = functional.interpolate(torch.rand(3, 3, 9, 12), (192, 256), mode="bicubic").clamp(0, 1)
    sizes = torch.tensor([[192, 256], [100, 200], [0, 0]])
    found = network(images.numpy(), sizes.numpy())
    events = json.loads(Path(network.session.end_profiling()).read_text())
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and "_kernel_time" in event["name"]]
    with torch.inference_mode():
        wanted = dsg.model.load(checkpoint, "cpu").model.infer(images, sizes)
    assert np.array_equal(found["valid"], wanted.valid.numpy())
    rows = found["valid"]
    np.testing.assert_allclose(found["boxes"][rows], wanted.boxes.numpy()[rows], rtol=0, atol=0.1)
    own = [node for node in nodes if node["op_name"] in ("MultiScaleSgRoIAlign", "BatchedNms")]
    assert len(own) == (5 if with_library else 0)
    assert all(node["provider"] == "CUDAExecutionProvider" for node in own)
    if with_library:
        # the features go from convolution to kernel on the GPU: no copy node is larger than sizes and counts
        copies = [node for node in nodes if node["op_name"].startswith("Memcpy")]
        assert sum(int(node.get("output_size", 0)) for node in copies) < 100_000


@pytest.mark.gpu
@pytest.mark.skipif(not OP_LIBRARY.is_file(), reason="the library is not built here")
@needs_cuda_provider
@pytest.mark.parametrize("half", [False, True])
def test_onnx_export_is_proven_on_a_gpu(half, checkpoint, tmp_path):
    said: list[str] = []
    export(checkpoint, Format.ONNX, tmp_path, device="cuda", half=half, say=said.append)
    assert len([line for line in said if line.startswith("the op by its")]) == 2


class BeforeSuppression(torch.nn.Module):
    """All that a DSG computes before a box is dropped, on RoIs that are given: no near-tie can swap anything."""

    def __init__(self, detector: torch.nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images, sizes, rois):
        network = self.detector
        levels = network._pyramid(images, sizes)
        objectness, deltas = network.rpn_head(levels)
        masks, _ = network.mpn(network.mask_features(levels[:-1], rois))
        features = network.box_features(levels[:-1], rois, masks[:, 0].sigmoid())
        return (*objectness, *deltas, masks, *network.box_head(features))


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda_provider]),
    ],
)
def test_r50_before_suppression(device, make_checkpoint, tmp_path):
    network = dsg.model.load(make_checkpoint(tmp_path / "r50.safetensors", "dsg_r50_fpn"), device, "float32").model
    images = functional.interpolate(torch.rand(2, 3, 9, 12), (320, 416), mode="bicubic").clamp(0, 1)
    corner = torch.rand(40, 2) * 250
    rois = torch.cat([torch.arange(40)[:, None] % 2, corner, corner + 4 + 150 * torch.rand(40, 2)], dim=1)
    given = (images, torch.tensor([[320, 416], [300, 400]]), rois)
    moved = tuple(tensor.to(device) for tensor in given)
    program = torch.onnx.export(
        BeforeSuppression(ExportGraph(network, half=False).detector),
        moved,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images", "sizes", "rois"],
        custom_translation_table=translations(),
        verbose=False,
    )
    model = program.model_proto
    add_bodies(model)
    onnx.save(model, tmp_path / "m.onnx")
    onnxruntime.preload_dlls()
    on_gpu = [("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider"]
    providers = on_gpu if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=providers)
    found = session.run(None, dict(zip(("images", "sizes", "rois"), (tensor.numpy() for tensor in given), strict=True)))
    with torch.inference_mode(), whole_float32():
        wanted = BeforeSuppression(network)(*moved)
    for one, other in zip(wanted, found, strict=True):
        scale = float(one.abs().max())
        torch.testing.assert_close(torch.from_numpy(other), one.cpu(), rtol=1e-3, atol=1e-4 * scale)


def test_the_weights_of_the_package_as_torchscript(tmp_path):
    # Of the size people have: there PyTorch's optimizer makes one of the lists that several calls of the op are given.
    path = export("dsg_lite0_coco", Format.TORCHSCRIPT, tmp_path, device="cpu", say=lambda line: None)
    assert read_contract(path).format is Format.TORCHSCRIPT
