"""A benchmark that is ended takes the server that it started with it."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from dsg.bench.service_processes import Setup, serving

with serving("dsg", Setup("dsg_lite0_coco", "cpu", max_batch=1), deadline_s=1.0) as running:
    print(running.process_id, flush=True)
    sys.stdin.readline()
"""


def test_sigterm_ends_the_server_too() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    server = int(process.stdout.readline())
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
        process.kill()
        process.wait(60)
        process.stdin.close()
        process.stdout.close()
