import builtins
import sys

import numpy as np
import pytest
import torch

import dsg.export
import dsg.model
from dsg.cli.main import run


def test_a_shipped_name_gives_the_predictor_that_the_model_room_gives():
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    name = dsg.export.load("dsg_lite0_coco", "cpu").info.name
    assert name == "dsg_lite0_coco"
    (one,), (other,) = (room.load(name, "cpu").predict([picture], 0.01) for room in (dsg.export, dsg.model))
    assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def test_a_pickle_is_named_with_what_to_do():
    with pytest.raises(ValueError, match=r"dsg import-weights model_final\.pth"):
        dsg.export.load("model_final.pth")


def test_a_missing_runtime_is_named_with_what_to_install(onnx_file, tmp_path, monkeypatch, capfd):
    real = builtins.__import__

    def without_onnxruntime(name, *rest):
        if name == "onnxruntime" or name == "dsg.export.onnx_runtime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    (tmp_path / "p.png").write_bytes(b"")
    assert run(["predict", str(tmp_path / "p.png"), "--model", str(onnx_file.path), "--out", str(tmp_path)]) == 2
    assert "pip install 'dsg[onnx]'" in capfd.readouterr().err


@pytest.mark.parametrize("device", ["tpu", "cuda:x"])
def test_an_unknown_device_of_an_onnx_file(onnx_file, device):
    with pytest.raises(ValueError, match=f"unknown device '{device}'"):
        dsg.export.load(onnx_file.path, device)


def test_a_gpu_that_onnxruntime_has_not(onnx_file, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="has no CUDA; install it with: pip install 'dsg\\[onnx-gpu\\]'"):
        dsg.export.load(onnx_file.path, "cuda")
    assert dsg.export.load(onnx_file.path).device == "cpu"


def test_a_gpu_without_torch_has_no_figures_of_its_memory(monkeypatch):
    """An ONNX file may be served on a GPU where torch is not installed: nobody asks torch about it."""
    from types import SimpleNamespace

    from dsg.service.local_device import memory_of

    monkeypatch.setitem(sys.modules, "torch", None)
    assert memory_of(SimpleNamespace(device="cuda")) == {}
