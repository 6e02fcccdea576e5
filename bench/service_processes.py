"""The servers that `dsg bench service` measures, each started, waited for and ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

WRONG_INPUT = 2
"""Exit status of a peer whose model is at fault; its last line on stderr says how."""
_START_S = 180
_END_S = 20


@dataclass(frozen=True)
class Setup:
    """What all of them serve, and how."""

    model: str
    device: str
    max_batch: int
    proposals: int | None = None
    """None is the model's own number."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    ready_s: float
    """Seconds from its start until it did."""
    process_id: int


@contextmanager
def serving(what: str, setup: Setup, deadline_s: float) -> Iterator[Running]:
    """Run `dsg`, `litserve` or `plain` on 127.0.0.1 as long as the block does, or until SIGTERM ends this process.

    LitServe is given the deadline at its start; ours hears it with each request.

    Raises:
        RuntimeError: it does not start.
    """
    port = _free_port()
    if what == "dsg":
        command = [sys.executable, "-m", "dsg.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--model", setup.model, "--device", setup.device]
        probe = "/readyz"
    else:
        command = [*_peer(what, setup), "--port", str(port), "--deadline-s", str(deadline_s)]
        probe = "/health"
    environment = {"DSG_MAX_BATCH": str(setup.max_batch)}
    if setup.proposals is not None:
        environment["DSG_PROPOSALS"] = str(setup.proposals)
    began = time.monotonic()
    with _signal_raises():
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait_ready(process, f"http://127.0.0.1:{port}{probe}", what)
            yield Running(port, time.monotonic() - began, process.pid)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            # LitServe's own processes outlive it; those of a server are all of one group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _signal_raises() -> Iterator[None]:
    """Have SIGTERM unwind this process, which would leave its server running otherwise: that is of another session."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut off the end of the server
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_process(setup: Setup, pictures: Path, seconds: float) -> tuple[float, float]:
    """(pictures a second in batches, seconds of one picture) of the model without a server.

    Raises:
        ValueError: a model that is not there or does not load.
        RuntimeError: one that does not run.
    """
    command = [*_peer("inprocess", setup), "--pictures", str(pictures), "--seconds", str(seconds)]
    with _signal_raises():
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ran.stderr.strip().rpartition("\n")[2]
    if ran.returncode == WRONG_INPUT:
        raise ValueError(said)
    if ran.returncode != 0:
        raise RuntimeError(f"the model does not run: {said or f'status {ran.returncode}'}")
    result = json.loads(ran.stdout.splitlines()[-1])
    return result["rate"], result["latency_s"]


def batch_sizes(port: int) -> dict[str, float]:
    """Batches of a dsg server by size, from its metrics: `1`, `2`, `3`, `4`, `5 to 6`, ..."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    sizes: dict[str, float] = {}
    below, count_below = 0, 0.0
    for line in text.splitlines():
        if line.startswith('dsg_batch_size_bucket{le="') and "+Inf" not in line:
            size = int(float(line.split('"')[1]))
            count = float(line.rsplit(" ", 1)[1])
            sizes[f"{size}" if size == below + 1 else f"{below + 1} to {size}"] = count - count_below
            below, count_below = size, count
    return sizes


def _peer(what: str, setup: Setup) -> list[str]:
    command = [sys.executable, "-m", "dsg.bench.service_peers", what, "--model", setup.model]
    command += ["--device", setup.device, "--max-batch", str(setup.max_batch)]
    return command if setup.proposals is None else [*command, "--proposals", str(setup.proposals)]


def _wait_ready(process: subprocess.Popen[bytes], url: str, what: str) -> None:
    give_up = time.monotonic() + _START_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"the server {what} ended with status {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"the server {what} was not ready after {_START_S} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
