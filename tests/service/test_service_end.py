"""How `dsg serve` ends: before it has begun, while it ends, with threads that do not, with clients that read slowly."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from service_fakes import encoded, picture
from service_process import server_process

from dsg.service.tracing import Tracing

GOOD = encoded(picture((20, 10, 60, 40)))
PNG = {"Content-Type": "image/png"}
# The command, with a predictor of the tests; what is put before it says where it waits for a line on stdin.
_COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])

def wait(what):
    print(what, flush=True)
    sys.stdin.readline()

{before}
from dsg.cli.main import run
sys.exit(run(["serve", "--port", "0", "--device", "cpu", "--model", "fake"]))
"""
_FAKE = """
import dsg.service.app
from service_fakes import FakePredictor
dsg.service.app.loader = lambda settings: lambda name, device: FakePredictor()
"""
_WAITS_TO_IMPORT = """
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "uvicorn":
            wait("importing")

sys.meta_path.insert(0, Finder())
"""
_WAITS_TO_STOP = """
from dsg.service.state import Service

async def stop(self):
    wait("stopping")

Service.stop = stop
"""
_NEVER_DECODES = """
import threading
import dsg.service.pipeline

def decode(*given):
    print("decoding", flush=True)
    threading.Event().wait()

dsg.service.pipeline.decode_picture = decode
"""
_COMPUTES = """
import dsg.service.pipeline
import torch

decode = dsg.service.pipeline.decode_picture

def decode_and_change(*given):
    FakePredictor.detect = compute  # not before: the first batches of a model are run before it serves
    return decode(*given)

def compute(self, prepared, score_threshold=0.0):
    print("computing", flush=True)
    while True:
        torch.ones(64, 64).mm(torch.ones(64, 64)).sum()

dsg.service.pipeline.decode_picture = decode_and_change
"""


@contextmanager
def command(before: str, **settings: str) -> Iterator["subprocess.Popen[str]"]:
    """`dsg serve` as a process of its own."""
    program = _COMMAND.format(before=before)
    environment = {f"DSG_{name.upper()}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def await_event(process: "subprocess.Popen[str]", name: str) -> dict:
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"it ended without {name}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_server_has_begun_ends_it_with_0(number: signal.Signals) -> None:
    with command(_WAITS_TO_IMPORT) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_at_the_very_end_is_no_failure(number: signal.Signals) -> None:
    with command(_FAKE + _WAITS_TO_STOP) as process:
        await_event(process, "serving")
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(number)
        assert process.wait(60) == 0


def test_a_server_told_to_outlive_its_terminal_does() -> None:
    with command(f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{_FAKE}") as process:
        url = await_event(process, "serving")["url"]
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_two_hang_ups_of_one_terminal_do_not_cut_off_what_is_in_flight() -> None:
    with command(_FAKE + _NEVER_DECODES, drain_ms="2000") as process, httpx.Client(timeout=60) as client:
        url = await_event(process, "serving")["url"]
        answers = ask(url)
        assert process.stdout.readline() == "decoding\n"
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            response = client.get(f"{url}/readyz")
            assert (response.status_code, response.json()["reason"]) == (503, "draining")
        assert answers.get(timeout=60).status_code == 503
        assert process.wait(60) == 0


def test_a_thread_that_never_ends_keeps_no_process_alive() -> None:
    with command(_FAKE + _NEVER_DECODES, drain_ms="100") as process:
        answers = ask(await_event(process, "serving")["url"])
        assert process.stdout.readline() == "decoding\n"
        process.send_signal(signal.SIGTERM)
        answer = answers.get(timeout=60)
        assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
        assert process.wait(60) == 0


@pytest.mark.parametrize("turn", range(3))
def test_a_device_in_the_middle_of_its_work_is_no_failure(turn: int) -> None:
    """A thread that torch's code returns to while Python ends is unwound by it, and the process with it."""
    with command(_FAKE + _COMPUTES, drain_ms="100") as process:
        answers = ask(await_event(process, "serving")["url"])
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signal.SIGTERM)
        assert answers.get(timeout=60).status_code == 503
        assert process.wait(60) == 0


def ask(url: str) -> "queue.Queue[httpx.Response]":
    answers: queue.Queue[httpx.Response] = queue.Queue()
    threading.Thread(
        target=lambda: answers.put(httpx.post(f"{url}/segment", content=GOOD, headers=PNG, timeout=60)), daemon=True
    ).start()
    return answers


def slow_reader(url: str) -> tuple[socket.socket, int]:
    """A connection on which an answer of several megabytes has begun to come, and how many bytes it is long."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 1500), np.uint8)
    body = encoded(Image.fromarray(noise))  # drawn on it, nothing becomes smaller
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((httpx.URL(url).host, httpx.URL(url).port))
    lines = ("POST /segment HTTP/1.1", "Host: x", "Content-Type: image/png", "Accept: image/png")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    connection.sendall(head.encode() + body)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1)
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    (length,) = [line for line in answer.lower().splitlines() if line.startswith(b"content-length: ")]
    return connection, int(length.split()[1])


def test_an_answer_that_is_being_sent_is_sent_to_its_end() -> None:
    with server_process() as server, httpx.Client(base_url=server.url) as client:
        connection, length = slow_reader(server.url)
        with connection:
            server.await_event("request")  # for the application it is done
            server.process.send_signal(signal.SIGTERM)
            server.await_event("draining")
            for _ in range(200):
                assert client.get("/readyz").status_code == 503
            assert length > 4_000_000
            assert sum(len(piece) for piece in iter(lambda: connection.recv(65536), b"")) == length
        assert server.process.wait(60) == 0


def test_a_client_that_does_not_read_has_the_time_to_drain_and_no_more() -> None:
    with server_process(drain_ms=200) as server:
        connection, _ = slow_reader(server.url)
        with connection:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0


def test_a_collector_that_never_answers_is_not_waited_for() -> None:
    class Provider:
        def shutdown(self) -> None:
            begun.set()
            threading.Event().wait()

    begun = threading.Event()
    tracing = Tracing(False)
    tracing._provider = Provider()
    tracing.close()
    assert begun.is_set()
