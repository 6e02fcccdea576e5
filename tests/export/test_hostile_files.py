"""Files that are cut short, of another origin, or changed: one line each, and nothing in them runs."""

import shutil
import zipfile

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsg.export
from dsg.cli.main import run
from dsg.export.container import read_contract
from dsg.export.contract import ExportError

KINDS = ["onnx", "torchscript"]


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        dsg.export.load(path, "cpu")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture(params=KINDS)
def copy(request, tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    file = request.getfixturevalue(f"{request.param}_file").path
    return shutil.copy(file, tmp_path / file.name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 0.99999])
def test_a_truncated_file(copy, share):
    data = copy.read_bytes()
    copy.write_bytes(data[: int(len(data) * share)])
    refused(copy, "cut short or damaged|did not write")


def test_a_file_with_changed_bytes(copy):
    data = bytearray(copy.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    copy.write_bytes(data)
    refused(copy, "checksum differs|cut short or damaged")


def test_a_file_of_something_else(copy):
    copy.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    refused(copy, "is not a")


def test_the_wrong_ending(copy, tmp_path):
    other = tmp_path / ("model.ts" if copy.suffix == ".onnx" else "model.onnx")
    copy.rename(other)
    refused(other, "is not a|did not write")
    if copy.suffix == ".ts":
        refused(other.rename(tmp_path / "model.pt2"), "is a torchscript file by what it says in it")


def test_no_such_file(tmp_path):
    for name in ("model.onnx", "model.ts", "model.pt2"):
        with pytest.raises(FileNotFoundError, match=f"no model at .*{name}"):
            dsg.export.load(tmp_path / name)


def test_a_foreign_onnx_file(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:])), tmp_path / "m.onnx")
    refused(tmp_path / "m.onnx", "an ONNX file that dsg export did not write")


def test_a_foreign_torchscript_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), tmp_path / "m.ts")
    refused(tmp_path / "m.ts", "a file that dsg export did not write")


def test_a_changed_description_is_refused(onnx_file, tmp_path):
    data = onnx_file.path.read_bytes()
    (tmp_path / "m.onnx").write_bytes(data.replace(b'"dsg_export": 1', b'"dsg_export": 9'))
    refused(tmp_path / "m.onnx", "its description cannot be read .version 9")


def test_something_behind_the_contract(onnx_file, tmp_path):
    """Whatever is put behind it would override the graph that was checked."""
    (tmp_path / "m.onnx").write_bytes(onnx_file.path.read_bytes() + b"\x08\x0a")
    refused(tmp_path / "m.onnx", "did not write")


def test_a_contract_given_twice(torchscript_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_TRUST_CODE", "1")
    path = shutil.copy(torchscript_file.path, tmp_path / "model.ts")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/extra/dsg.json", "{}")
    refused(path, "did not write")


@pytest.mark.parametrize("value", [None, "0", "yes"])
def test_code_needs_trust(torchscript_file, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("DSG_TRUST_CODE", value)
    refused(torchscript_file.path, "set DSG_TRUST_CODE=1 .*a checksum is no signature")


def test_onnx_is_no_code_and_needs_none(onnx_file):
    assert dsg.export.load(onnx_file.path, "cpu").info.name == "random"


def test_the_command_line_says_it_in_one_line(torchscript_file, capfd, tmp_path):
    picture = tmp_path / "p.png"
    from PIL import Image

    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(picture)
    assert run(["predict", str(picture), "--model", str(torchscript_file.path), "--out", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "DSG_TRUST_CODE=1" in err[0]


@given(data=st.binary(max_size=300), ending=st.sampled_from([".onnx", ".ts", ".pt2"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, data, ending):
    path = tmp_path_factory.mktemp("any") / f"m{ending}"
    path.write_bytes(data)
    with pytest.raises(ExportError) as caught:
        read_contract(path)
    assert "\n" not in str(caught.value)
