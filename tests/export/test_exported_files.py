"""What `dsg export` writes, run as a user runs it, against the checkpoint that it was made from."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

import dsg.export
import dsg.model
from dsg.export.container import read_contract
from dsg.export.contract import INPUTS, OUTPUTS
from dsg.export.op_library import OP_LIBRARY


@pytest.fixture(params=["onnx", "torchscript"])
def exported(request, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    return request.getfixturevalue(f"{request.param}_file").path


def test_predictions_are_those_of_the_checkpoint(exported, checkpoint, pictures):
    wanted = dsg.model.load(checkpoint, "cpu").predict([*pictures, *pictures[:2]], 0.05)
    predictor = dsg.export.load(exported, "cpu")
    assert isinstance(predictor, dsg.model.Predictor)
    found = predictor.predict([*pictures, *pictures[:2]], 0.05)
    assert sum(map(len, wanted)) > 30
    for one, other in zip(wanted, found, strict=True):
        assert one.image_size == other.image_size and torch.equal(one.labels, other.labels)
        torch.testing.assert_close(other.boxes, one.boxes, rtol=0, atol=1e-2)
        torch.testing.assert_close(other.scores, one.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(other.mask_probs, one.mask_probs, rtol=0, atol=1e-3)


def test_every_form_of_a_picture(exported, pictures, tmp_path):
    from PIL import Image

    predictor = dsg.export.load(exported, "cpu")
    Image.fromarray(pictures[0]).save(tmp_path / "one.png")
    tensor = torch.from_numpy(pictures[0]).permute(2, 0, 1)
    forms = [pictures[0], Image.fromarray(pictures[0]), tmp_path / "one.png", tensor]
    results = predictor.predict(forms, 0.1, max_detections=5)
    assert all(0 < len(result) <= 5 and torch.equal(result.boxes, results[0].boxes) for result in results[1:])
    (floats,) = predictor.predict([tensor.float() / 255], 0.1, max_detections=5)
    torch.testing.assert_close(floats.boxes, results[0].boxes, rtol=0, atol=2.0)


def test_a_predictor_of_a_file_has_no_module(exported, checkpoint):
    predictor = dsg.export.load(exported, "cpu")
    assert predictor.info == dsg.model.load(checkpoint, "cpu").info
    assert str(predictor.device) == "cpu"
    with pytest.raises(AttributeError, match="random is an exported file"):
        predictor.model  # noqa: B018


def test_contract(exported, checkpoint):
    contract = read_contract(exported)
    info = dsg.model.load(checkpoint, "cpu").info
    assert contract.checkpoint == info and len(info.hash) == 64 and contract.checkpoint.licence == "Apache-2.0"
    assert contract.precision == "float32" and contract.device == "any"
    assert any("roi_align" in op.lower() or "SgRoIAlign" in op for op in contract.ops)
    assert contract.written_by.startswith("dsg ") and "torch 2." in contract.written_by


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_alone_at_every_batch(onnx_file, checkpoint, batch):
    """By onnxruntime as it comes from PyPI, with the file's inputs and outputs, and nothing of ours."""
    session = onnxruntime.InferenceSession(onnx_file.path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(INPUTS)
    assert [one.name for one in session.get_outputs()] == list(OUTPUTS)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    detector = dsg.model.load(checkpoint, "cpu").model
    generator = torch.Generator().manual_seed(batch)
    for height, width in ((96, 160), (203, 150), (40, 50)):
        images = torch.rand(batch, 3, height // 8 + 1, width // 8 + 1, generator=generator)
        images = functional.interpolate(images, (height, width), mode="bilinear")
        sizes = torch.tensor([[height, width], [height // 2, width - 7], [0, 0], [33, 40], [height, width]])[:batch]
        padded = functional.pad(images, (0, -width % 32, 0, -height % 32))
        with torch.inference_mode():
            wanted = detector.infer(padded, sizes)
        results = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        found = dict(zip(OUTPUTS, results, strict=True))
        assert np.array_equal(found["valid"], wanted.valid.numpy())
        assert found["valid"][0].any() and not (batch > 2 and found["valid"][2].any())
        assert np.array_equal(found["labels"], wanted.labels.numpy())
        np.testing.assert_allclose(found["boxes"], wanted.boxes.numpy(), rtol=0, atol=1e-2)
        np.testing.assert_allclose(found["scores"], wanted.scores.numpy(), rtol=0, atol=1e-4)
        rows = found["valid"]
        np.testing.assert_allclose(found["mask_probs"][rows], wanted.mask_probs.numpy()[rows], rtol=0, atol=1e-3)


def test_the_onnx_graph(onnx_file):
    model = onnx.load(onnx_file.path)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    kinds = {node.op_type for part in (model.graph, *model.functions) for node in part.node}
    assert not kinds & {"Loop", "Scan", "If"} and {"NonMaxSuppression", "ScatterND", "TopK"} <= kinds
    own = sorted((node.domain, node.op_type) for node in model.graph.node if node.domain not in ("", "ai.onnx"))
    assert own == [("dsg", "BatchedNms")] * 2 + [("dsg", "MultiScaleSgRoIAlign")] * 3
    assert {opset.domain: opset.version for opset in model.opset_import}[""] >= 18
    assert {function.domain for function in model.functions} == {"dsg"}
    # onnxruntime in any language sees the contract
    session = onnxruntime.InferenceSession(onnx_file.path, providers=["CPUExecutionProvider"])
    document = json.loads(session.get_modelmeta().custom_metadata_map["dsg"])
    assert [category["id"] for category in document["checkpoint"]["categories"]] == [7, 3, 12]
    assert document["inputs"] == INPUTS and document["outputs"] == OUTPUTS


def test_nothing_infinite_is_ranked(onnx_file, tmp_path):
    """onnxruntime's TopK on a GPU makes up values and indices where it meets infinities (its issue 9843)."""
    model = onnx.load(onnx_file.path)
    ranked = [node.input[0] for node in model.graph.node if node.op_type == "TopK"]
    given = {output.name for output in model.graph.output}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for name in set(ranked) - given:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    onnx.save(model, tmp_path / "ranked.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ranked.onnx", providers=["CPUExecutionProvider"])
    feed = {"images": np.zeros((2, 3, 96, 96), np.float32), "sizes": np.array([[96, 96], [0, 0]])}
    assert len(ranked) >= 6  # five levels at least, and the detections
    for array in session.run(ranked, feed):
        assert np.isfinite(array).all()


@pytest.mark.skipif(not OP_LIBRARY.is_file(), reason="the library is not built here")
def test_the_library_takes_the_nodes_over(onnx_file, tmp_path):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(OP_LIBRARY))
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_file.path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": np.zeros((1, 3, 96, 96), np.float32), "sizes": np.array([[96, 96]])})
    events = json.loads(open(session.end_profiling()).read())
    kinds = [
        event["args"].get("op_name") for event in events if event.get("cat") == "Node" and "kernel" in event["name"]
    ]
    assert kinds.count("MultiScaleSgRoIAlign") == 3 and "RoiAlign" not in kinds
    assert kinds.count("BatchedNms") == 2 and "NonMaxSuppression" not in kinds


def test_the_proof_says_what_it_compared(onnx_file, torchscript_file):
    for said in (onnx_file.said, torchscript_file.said):
        assert any("5 pictures of several sizes" in line and "detections equal" in line for line in said)
        assert any("2 pictures without anything to find: 0 of 0" in line for line in said)
    ways = [line for line in onnx_file.said if line.startswith("the op by its")]
    assert len(ways) == 1 + OP_LIBRARY.is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="one platform is enough")
def test_onnx_without_torch(onnx_file, checkpoint, pictures, tmp_path):
    """Everything around the file works where torch cannot be imported, and gives the same COCO results."""
    np.savez(tmp_path / "pictures.npz", *pictures)
    program = f"""
import sys, json
sys.modules["torch"] = None
import numpy as np
import dsg.export
predictor = dsg.export.load({str(onnx_file.path)!r}, "cpu")
with np.load({str(tmp_path / "pictures.npz")!r}) as file:
    found = predictor.predict([file[name] for name in file.files], 0.1)
assert all(type(one.boxes) is np.ndarray and one.masks().shape == (len(one), *one.image_size) for one in found)
print(json.dumps([one.to_coco(number, predictor.info.category_ids) for number, one in enumerate(found)]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)
    wanted = dsg.model.load(checkpoint, "cpu").predict(pictures, 0.1)
    ids = dsg.model.load(checkpoint, "cpu").info.category_ids
    for number, (one, own) in enumerate(zip(wanted, results, strict=True)):
        rows = one.to_coco(number, ids)
        assert [row["category_id"] for row in own] == [row["category_id"] for row in rows]
        np.testing.assert_allclose([row["bbox"] for row in own], [row["bbox"] for row in rows], rtol=0, atol=2e-2)
        same = sum(a["segmentation"] == b["segmentation"] for a, b in zip(own, rows, strict=True))
        assert same >= 0.8 * len(rows)
