"""The server as a process of its own: signals, exit status, and errors in one line."""

import json
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from service_fakes import FakePredictor, encoded, picture

from dsg.service.run import ServiceError, serve
from dsg.service.settings import Settings

GOOD = encoded(picture((20, 10, 60, 40)))
# A picture of 97 pixels width waits for a line on stdin, so that the test says when it is done.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from service_fakes import FakePredictor
from dsg.service.run import serve
from dsg.service.settings import Settings

class Waiting(FakePredictor):
    def detect(self, prepared, score_threshold):
        if any(one.original_size[1] == 97 for one in prepared):
            print("entered", flush=True)
            sys.stdin.readline()
        return super().detect(prepared, score_threshold)

serve(Settings(port=0, model="fake"), lambda name, device: Waiting())
print("returned", flush=True)
"""


class Process:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log: queue.Queue[dict] = queue.Queue()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.serving = self.await_event("serving")
        self.url = self.serving["url"]

    def _read_log(self) -> None:
        for line in self.process.stderr:
            self._log.put(json.loads(line))  # nothing but JSON on stderr where no one watches

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        self._reader.join(60)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()

    def next_event(self) -> dict:
        return self._log.get(timeout=60)

    def await_event(self, name: str) -> dict:
        while True:
            event = self.next_event()
            if event["event"] == name:
                return event


@pytest.fixture
def process() -> Iterator[Process]:
    running = Process()
    yield running
    running.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_what_is_in_flight_and_exits_0(process: Process, number: signal.Signals) -> None:
    assert process.serving["models"] == "fake" and process.serving["kernel"]
    answers: queue.Queue[httpx.Response] = queue.Queue()
    waiting = encoded(picture((20, 10, 60, 40), size=(97, 64)))

    def ask() -> None:
        answers.put(
            httpx.post(f"{process.url}/segment", content=waiting, headers={"Content-Type": "image/png"}, timeout=60)
        )

    threading.Thread(target=ask, daemon=True).start()
    assert process.process.stdout.readline() == "entered\n"
    assert httpx.get(f"{process.url}/readyz").status_code == 200
    process.process.send_signal(number)
    assert process.await_event("draining")["requests"] == 1
    response = httpx.get(f"{process.url}/readyz")
    assert (response.status_code, response.json()["reason"]) == (503, "draining")
    assert httpx.get(f"{process.url}/healthz").status_code == 200
    refused = httpx.post(f"{process.url}/segment", content=GOOD, headers={"Content-Type": "image/png"})
    assert refused.status_code == 503
    process.process.stdin.write("go on\n")
    process.process.stdin.flush()
    answer = answers.get(timeout=60)
    assert answer.status_code == 200
    event = process.await_event("request")
    while event["status"] != 200 or event["path"] != "/segment":
        event = process.await_event("request")
    assert event["request_id"] == answer.headers["x-request-id"] and event["pictures"] == 1
    assert [one["bbox"] for one in answer.json()["annotations"]] == [[20, 10, 40, 30]]
    assert process.process.stdout.readline() == "returned\n"
    assert process.process.wait(60) == 0


def test_what_a_client_sends_brings_no_line_of_a_library_into_the_log(process: Process) -> None:
    body = b"--b\r\nno header\r\n\r\n--b--\r\n"  # of which python-multipart would warn
    response = httpx.post(
        f"{process.url}/segment", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert response.status_code == 400, response.text
    assert process.next_event()["event"] == "request"


def test_a_second_signal_ends_it_at_once(process: Process) -> None:
    waiting = encoded(picture(size=(97, 64)))

    answers: queue.Queue[int | None] = queue.Queue()

    def ask() -> None:
        try:
            response = httpx.post(
                f"{process.url}/segment", content=waiting, headers={"Content-Type": "image/png"}, timeout=60
            )
            answers.put(response.status_code)
        except httpx.HTTPError:
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    assert process.process.stdout.readline() == "entered\n"
    process.process.send_signal(signal.SIGINT)
    process.await_event("draining")
    process.process.send_signal(signal.SIGINT)
    process.process.wait(60)  # though the device is still at it
    assert answers.get(timeout=60) in (503, None)


@pytest.fixture
def _log_as_before() -> Iterator[None]:
    """`serve` sets up the log of its process, which here is that of all tests."""
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    yield
    structlog.configure(**before)
    logging.root.handlers[:] = handlers


@pytest.mark.usefixtures("_log_as_before")
def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another port"):
            serve(Settings(port=port), lambda name, device: pytest.fail("no model is loaded for a port that is taken"))


@pytest.mark.usefixtures("_log_as_before")
def test_an_address_of_another_machine_is_one_line() -> None:
    with pytest.raises(ServiceError, match=r"cannot listen on 203.0.113.1:80: .*an address of this machine") as caught:
        serve(Settings(host="203.0.113.1", port=80))  # of a network that is for documents alone
    assert "another port" not in str(caught.value)


@pytest.mark.usefixtures("_log_as_before")
def test_a_word_for_the_op_that_means_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_OPS", "bogus")
    with pytest.raises(ServiceError, match="DSG_OPS is 'bogus'; set reference"):
        serve(Settings(port=0), lambda name, device: pytest.fail("nothing is loaded"))


@pytest.mark.usefixtures("_log_as_before")
def test_without_a_folder_for_torch_to_write_to_the_line_says_so() -> None:
    def load(name: str, device: str | None) -> FakePredictor:
        raise FileNotFoundError("No usable temporary directory found in ['/tmp']")  # as Python's tempfile does

    with pytest.raises(ServiceError, match=r"cannot load fake: .*\['/tmp'\]; .*mount /tmp, or set TMPDIR"):
        serve(Settings(model="fake", device="cpu", port=0), load)


@pytest.mark.usefixtures("_log_as_before")
def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(ServiceError, match="cannot listen on no such host"):
        serve(Settings(host="no such host", port=0))


@pytest.mark.usefixtures("_log_as_before")
def test_a_model_that_does_not_load_is_one_line() -> None:
    with pytest.raises(ServiceError, match="cannot load nothing_like_it: ") as caught:
        serve(Settings(model="nothing_like_it", port=0))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_log_as_before")
@pytest.mark.parametrize("workers", ["thread", "process"])
def test_two_models_of_one_name_are_refused_before_any_is_loaded(workers: str) -> None:
    names = "runs/a/best.safetensors,other,runs/b/best.safetensors"
    settings = Settings(model=names, port=0, device="cpu", workers=workers)
    with pytest.raises(ServiceError, match=r"'best'.*rename one file.*DSG_MODEL_DIR") as caught:
        serve(settings, lambda name, device: pytest.fail("nothing is loaded"))
    message = str(caught.value)
    assert "runs/a/best.safetensors and runs/b/best.safetensors" in message and "\n" not in message
