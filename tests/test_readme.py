"""The README does what it says: its Python runs, its commands and settings exist, its links lead on."""

import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from dsg.cli.main import app
from dsg.model import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint
from dsg.service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL_LINES = [
    words
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]


def lines_of(program: str) -> list[list[str]]:
    """What the README calls a program with."""
    found = [words[1:] for words in SHELL_LINES if words[0] == program]
    assert found, f"the README shows no {program}"
    return found


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with photo.jpg, and random weights in place of the trained ones; returns their path."""
    torch.manual_seed(0)
    path = tmp_path / "random.safetensors"
    info = CheckpointInfo(
        name="random",
        preset="dsg_lite0_fpn",
        overrides={"max_detections": 5},
        categories=(Category(1, "thing"),),
        resize=Resize(128, 160),
        score_threshold=0.0,
        max_detections=5,
    )
    save_checkpoint(path, build("dsg_lite0_fpn", 1, max_detections=5), info)
    noise = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return str(path)


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_runs(number: int, stand_ins: str) -> None:
    source = (
        PYTHON_BLOCKS[number].replace("dsg_lite0_coco", stand_ins).replace("score_threshold=0.3", "score_threshold=0")
    )
    names: dict = {}
    exec(compile(source, f"README.md, Python block {number}", "exec"), names)
    if "masks" in names:
        assert names["masks"].shape == (len(names["found"]), 120, 150) and len(names["results"]) > 0
    if "losses" in names:
        assert all(torch.isfinite(loss) for loss in names["losses"].values())
    if "pooled" in names:
        assert names["pooled"].shape == (1, 8, 7, 7)
    if "build" in names:
        assert isinstance(names["build"](3), torch.nn.Module)
    assert {"masks", "losses", "pooled", "build"} & names.keys()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=|ifdef ([A-Z_]+)", makefile, re.MULTILINE))
    known = {name for pair in variables for name in pair if name}
    inline = [shlex.split(text)[1:] for text in re.findall(r"`(make [^`]+)`", README)]
    for words in lines_of("make") + inline:
        assert words[0] in targets, words
        assert {word.partition("=")[0] for word in words[1:]} <= known, words


def test_commands_and_options_exist() -> None:
    for words in lines_of("dsg"):
        command, rest = typer.main.get_command(app), list(words)
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_every_setting_is_listed_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(DSG_[A-Z_]+)` \| ([^|]+) \|", README, re.MULTILINE))
    assert set(rows) == {f"DSG_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        shown = rows[f"DSG_{name.upper()}"]
        assert field.default is None or shown == str(field.default), (name, shown)


def test_links_lead_somewhere() -> None:
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert targets
    assert not [target for target in targets if not (ROOT / target.partition("#")[0]).exists()]


def test_python_versions_are_pyprojects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14" and "Python 3.11 to 3.13" in README
