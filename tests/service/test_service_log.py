"""The log, when no one reads it, when there is nothing to write to, and when half a line was written."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from service_process import ServerProcess

from dsg.service.logs import LogLines

_SMALLEST_PIPE = 4096
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from service_fakes import load_faulty
from dsg.service.run import serve
from dsg.service.settings import Settings

serve(Settings(port=int(sys.argv[2]), model="fake", device="cpu"), load_faulty)
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(end to read, end to write) of one that is full after a page."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _SMALLEST_PIPE)
    yield read, write
    os.close(read)  # a thread may still wait to write: this ends it


def until(read: int, is_enough: Callable[[bytes], bool]) -> bytes:
    found = b""
    while not is_enough(found):
        found += os.read(read, 65536)
    return found


def test_lines_without_a_reader_are_lost_and_hold_no_one_up(pipe: tuple[int, int]) -> None:
    read, write = pipe
    lines = LogLines(write)
    for number in range(30_000):
        lines.write(f"{number}\n")
    lines.end()  # gives up
    found = until(read, lambda found: found.count(b"\n") > 5000)
    lines.write("the reader is back\n")
    found += until(read, lambda found: found.endswith(b"back\n"))
    numbers = [int(line) for line in found.splitlines()[:-1]]
    assert numbers[:5000] == list(range(5000)) and numbers == sorted(set(numbers))  # each whole, in order, once
    assert len(numbers) < 30_000


def test_what_waits_is_written_at_the_end(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        lines = LogLines(file.fileno())
        for number in range(5000):
            lines.write(f"{number}\n")
        lines.end()
    assert len((tmp_path / "log").read_bytes().splitlines()) == 5000


def test_half_a_line_spoils_no_other(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.set_blocking(write, False)  # what does not fit fails, as on a disk that is full
    lines = LogLines(write)
    lines.write("x" * (_SMALLEST_PIPE + 10) + "\n")
    lines.write("lost\n")
    lines.end()
    assert os.read(read, 65536) == b"x" * _SMALLEST_PIPE
    lines.write("whole\n")
    lines.write("and the next\n")
    lines.end()
    assert os.read(read, 65536) == b"\nwhole\nand the next\n"


def test_a_reader_that_stops_reading_stops_no_request(pipe: tuple[int, int]) -> None:
    read, write = pipe
    running = ServerProcess({"model": "fake", "device": "cpu"}, {}, stderr=write)
    os.close(write)
    try:
        log = until(read, lambda found: b'"serving"' in found and found.endswith(b"\n"))
        url = json.loads(log.splitlines()[-1])["url"]
        with httpx.Client(base_url=url, timeout=30) as client:
            for _ in range(200):  # a line each
                assert client.get("/nothing").status_code == 404
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
    finally:
        running.close()


def test_a_server_without_stderr_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with httpx.Client(timeout=30) as client:
        command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parent), str(port)]
        process = subprocess.Popen(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.DEVNULL)
        try:
            status = None
            while status is None:
                assert process.poll() is None
                try:
                    status = client.get(f"http://127.0.0.1:{port}/healthz").status_code
                except httpx.ConnectError:
                    continue
            assert status == 200
            assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull  # and no connection
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait(60)
