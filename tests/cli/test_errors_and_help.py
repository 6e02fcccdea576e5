"""Exit codes, one-line errors, and a quick `--help`."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

from dsg.cli import errors
from dsg.cli.loading import DEFAULT_MODEL
from dsg.cli.main import app
from dsg.service.settings import Settings


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = "import sys; from dsg.cli.main import run; print(run(['--help'])); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert lines[-2:] == ["0", "False"]
    for name in typer.main.get_command(app).commands:
        assert any(line.split()[:1] == [name] for line in lines), name


def test_the_process_exits_with_the_code() -> None:
    ran = subprocess.run([sys.executable, "-m", "dsg.cli", "predict"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("dsg: error: ") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["models", "--nonsense"], ["predict", "a.png", "--max-detections", "x"]]
)
def test_usage_errors(command: Callable, arguments: list[str]) -> None:
    ran = command(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("dsg: error: ") and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\nlines"), 2, "dsg: error: two lines"),
        (
            FileNotFoundError(2, "No such file or directory", "a.json"),
            2,
            "dsg: error: a.json: No such file or directory",
        ),
        (FileNotFoundError("no weights here"), 2, "dsg: error: no weights here"),
        (ModuleNotFoundError("x", name="fastapi.responses"), 2, "pip install 'dsg[serve]'"),
        (ModuleNotFoundError("x", name="dsg.nothing"), 1, "ModuleNotFoundError"),
        (KeyError("boxes"), 1, "KeyError: 'boxes' (a fault of dsg; DSG_DEBUG=1 shows the traceback)"),
        (AssertionError(), 1, "AssertionError: AssertionError"),
        (KeyboardInterrupt(), 130, "dsg: interrupted"),
    ],
)
def test_report(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    assert errors.report(error) == code
    printed = capsys.readouterr()
    assert not printed.out and line in printed.err and printed.err.count("\n") == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_DEBUG", "1")
    try:
        raise ValueError("wrong")
    except ValueError as error:
        assert errors.report(error) == 2
    assert "Traceback" in capsys.readouterr().err


def test_models_lists_presets_and_weights(command: Callable) -> None:
    ran = command("models", "--json")
    assert ran.code == 0, ran.err
    listed = json.loads(ran.out)
    assert all(preset["exports"] == ["onnx", "torchscript", "aoti"] for preset in listed["presets"])
    parameters = {preset["name"]: preset["parameters"] for preset in listed["presets"]}
    # 81 outputs on ResNet-50: the first and the last row of the paper's Table 1, and the lite limit
    assert parameters["mask_rcnn_r50_fpn"] == 44_347_573
    assert parameters["dsg_r50_fpn"] == 48_150_710
    assert parameters["dsg_lite0_fpn"] <= 12_000_000
    for weight in listed["weights"]:
        assert 0 <= weight["score_threshold"] <= 1 and 0 <= weight["class_precision"] <= 1
        assert len(weight["class_thresholds"]) in (0, len(weight["classes"]))
    text = command("models")
    assert text.code == 0
    assert all(weight["name"] in text.out and weight["threshold_in_words"] in text.out for weight in listed["weights"])


def test_one_default_model() -> None:
    assert Settings().model == DEFAULT_MODEL
