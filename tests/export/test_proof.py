"""The proof: what counts as the same detections, and that a file that differs is not kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsg.cli.main import run
from dsg.export import writing
from dsg.export.contract import ExportError, Format
from dsg.export.exportable import refusal
from dsg.export.proof import FLOAT32, NOTHING, Comparison, compare
from dsg.export.proof_cases import cases_of_pictures, made_up_cases
from dsg.model.network.info import Category, CheckpointInfo, Resize
from dsg.model.network.presets import preset_config, presets


def detections(count: int, images: int = 1, rows: int = 30) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 100, (images, rows, 2))
    valid = np.zeros((images, rows), bool)
    valid[:, :count] = True
    return {
        "valid": valid,
        "boxes": np.concatenate([corner, corner + 30], axis=2).astype(np.float32),
        "scores": np.sort(generator.uniform(0.1, 1, (images, rows)).astype(np.float32))[:, ::-1].copy(),
        "labels": generator.integers(1, 4, (images, rows)),
        "mask_probs": generator.uniform(0, 1, (images, rows, 28, 28)).astype(np.float32),
    }


def test_equal_detections_match_in_any_order() -> None:
    one = detections(20, images=2)
    order = np.random.default_rng(1).permutation(30)
    other = {name: array[:, order] for name, array in one.items()}
    assert compare(one, other, FLOAT32) == Comparison(40, 40, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("boxes", lambda array: array + 0.011),
        ("scores", lambda array: array - 2e-4),
        ("labels", lambda array: array % 3 + 1),
        ("valid", lambda array: array & False),
        ("mask_probs", lambda array: 1 - array),
    ],
)
def test_each_part_counts(name, change) -> None:
    one = detections(20)
    other = {**one, name: change(one[name]).astype(one[name].dtype)}
    assert compare(one, other, FLOAT32).matched == 0


def test_a_detection_has_one_partner() -> None:
    one = detections(2)
    for array in one.values():
        array[:, 1] = array[:, 0]
    other = {**one, "valid": one["valid"] & (np.arange(30) < 1)}
    assert compare(one, other, FLOAT32).matched == 1 and compare(other, one, FLOAT32).matched == 1


def test_few_sure_detections_are_filled_up_with_others() -> None:
    one = detections(30)
    one["scores"] *= 0.04
    assert compare(one, one, FLOAT32).compared == 20
    one["scores"] *= 25
    assert compare(one, one, FLOAT32).compared == 30
    assert compare(detections(0), detections(0), FLOAT32) == NOTHING and NOTHING.share == 1.0


def test_other_shapes_types_and_numbers_are_named() -> None:
    one = detections(3)
    with pytest.raises(ValueError, match=r"labels is int32 \[1, 30\], not int64"):
        compare(one, {**one, "labels": one["labels"].astype(np.int32)}, FLOAT32)
    with pytest.raises(ValueError, match="boxes holds numbers that are not finite"):
        compare(one, {**one, "boxes": one["boxes"] * np.nan}, FLOAT32)


def test_cases_are_of_other_sizes_than_the_recorded_one() -> None:
    cases = made_up_cases()
    assert {len(case.images) for case in cases} >= {1, 5}
    assert any(case.images.shape[2] % 32 for case in cases) and any((case.sizes == 0).all() for case in cases)
    assert all(0 <= case.images.min() and case.images.max() <= 1 for case in cases)
    more = made_up_cases(half=True)[len(cases) :]
    assert [len(case.images) for case in more] == [5, 5] and not np.array_equal(more[0].images, more[1].images)


def test_pictures_of_the_user_go_alone_and_in_fives(tmp_path) -> None:
    from PIL import Image

    paths = []
    for number in range(7):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.zeros((40 + number, 60, 3), np.uint8)).save(paths[-1])
    info = CheckpointInfo("x", "x", {}, (Category(1, "x"),), Resize(32, 64), 0.5)
    assert [len(case.images) for case in cases_of_pictures(paths, info)] == [1] * 7 + [5, 2]


def _write_wrong(graph, path: Path, device: torch.device) -> tuple[str, ...]:
    graph.detector.box_head.regressor.bias.data += 0.05
    return writing.writers.write_torchscript(graph, path, device)


def test_a_file_that_differs_is_not_left_behind(checkpoint, tmp_path, monkeypatch) -> None:
    old = tmp_path / "model.ts"
    old.write_bytes(b"what was there before")
    monkeypatch.setitem(writing._WRITERS, Format.TORCHSCRIPT, _write_wrong)
    said: list[str] = []
    with pytest.raises(ExportError, match=r"the torchscript file differs from the model and was not kept: \d+ of"):
        writing.export(checkpoint, Format.TORCHSCRIPT, tmp_path, say=said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["model.ts"]
    assert old.read_bytes() == b"what was there before"


def test_a_file_that_does_not_run_is_not_left_behind(checkpoint, tmp_path, monkeypatch) -> None:
    def write_nonsense(graph, path: Path, device: torch.device) -> tuple[str, ...]:
        path.write_bytes(b"\x0a\x02hi")
        return ()

    monkeypatch.setitem(writing._WRITERS, Format.ONNX, write_nonsense)
    with pytest.raises(ExportError, match=r"does not run in a fresh process and was not kept: .*onnxruntime"):
        writing.export(checkpoint, Format.ONNX, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_file_is_no_source(onnx_file, tmp_path, capfd) -> None:
    assert run(["export", "--model", str(onnx_file.path), "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert "is an exported file already" in capfd.readouterr().err


def test_unknown_model_and_device(tmp_path, capfd) -> None:
    assert run(["export", "--model", "nothing", "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert run(["export", "--format", "aoti", "--device", "cuda:7", "--out", str(tmp_path)]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert len(err) == 2 and "no weights 'nothing'" in err[0] and "device cuda:7 is not there" in err[1]
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_exported_is_known_before_training() -> None:
    for name in presets():
        assert [refusal(preset_config(name), kind) for kind in Format] == [None] * 3
    adaptive = replace(preset_config("dsg_r50_fpn"), roi_sampling_ratio=0)
    assert "use 1 or more" in str(refusal(adaptive, Format.ONNX)) and refusal(adaptive, Format.TORCHSCRIPT) is None
