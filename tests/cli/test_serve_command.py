"""`dsg serve`: options and DSG_* variables become settings, and wrong ones end in one line."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsg.service.settings import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Settings that a server was started with; none really starts."""
    seen: list[Settings] = []
    monkeypatch.setattr("dsg.service.run.serve", seen.append)
    return seen


def test_options_win_over_variables(
    command: Callable, started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSG_PORT", "9001")
    monkeypatch.setenv("DSG_MAX_BATCH", "3")
    assert command("serve").code == 0
    assert (
        command("serve", "--port", 9002, "--host", "0.0.0.0", "--model", "a.safetensors", "--device", "cpu").code == 0
    )
    assert command("serve", "--devices", "all").code == 0
    first, second, third = started
    assert (third.device, third.devices) == (None, "all")
    assert (first.port, first.max_batch, first.host) == (9001, 3, "127.0.0.1")
    assert (second.port, second.max_batch, second.host) == (9002, 3, "0.0.0.0")
    assert (second.models, second.device) == (["a.safetensors"], "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [("DSG_PORT", "http"), ("DSG_PORT", "70000"), ("DSG_MAX_QUEUE", "1"), ("DSG_MODEL", "a,,b")],
)
def test_wrong_settings_are_named(
    command: Callable, started: list[Settings], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    ran = command("serve")
    assert ran.code == 2 and not started
    assert ran.err.startswith("dsg: error: wrong setting") and ran.err.count("\n") == 1
    assert name in ran.err or name.removeprefix("DSG_").lower() in ran.err


def test_a_taken_port_and_a_missing_model(tmp_path: Path) -> None:
    """In a process of its own: the server sets up the log of its whole process."""

    def serve(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsg.cli", "serve", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = serve("--port", port)
    assert ran.returncode == 2 and str(port) in ran.stderr and ran.stderr.count("\n") == 1
    ran = serve("--port", 0, "--model", tmp_path / "none.safetensors")
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and last.startswith("dsg: error: ") and "none.safetensors" in last
