"""A server as a process of its own, for the tests that kill, flood or starve it."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from service_fakes import load_faulty
from dsg.service.models import load_predictor
from dsg.service.run import serve
from dsg.service.settings import Settings

settings = json.loads(sys.argv[2])
serve(Settings(**{"port": 0, **settings}), load_faulty if settings["model"].startswith("fake") else load_predictor)
"""
_PATIENCE_S = 120


class ServerProcess:
    """A running server; its log can be read event by event."""

    def __init__(self, settings: dict[str, Any], environment: dict[str, str], stderr: Any = subprocess.PIPE) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parent), json.dumps(settings, default=str)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, text=True, env={**os.environ, **environment}
        )
        self._log: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        if stderr == subprocess.PIPE:
            self._reader.start()
            serving = self.await_event("serving")
            self.url: str = serving["url"]
            self.start_s: float = serving["start_s"]

    def await_event(self, name: str) -> dict[str, Any]:
        while True:
            event = self._log.get(timeout=_PATIENCE_S)
            if event["event"] == name:
                return event

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels, as it stands there."""
        text = httpx.get(f"{self.url}/metrics", timeout=_PATIENCE_S).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def workers(self) -> list[int]:
        """Process ids of its devices' processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        others = [
            int(pid)
            for task in Path(f"/proc/{self.process.pid}/task").iterdir()
            for pid in (task / "children").read_text().split()
        ]
        return sorted({*map(int, children), *others})

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(_PATIENCE_S)
        if self._reader.ident is not None:
            self._reader.join(_PATIENCE_S)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self._log.put(json.loads(line))
            else:
                sys.stderr.write(line)


@contextmanager
def server_process(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[ServerProcess]:
    """Run a server as long as the block does."""
    running = ServerProcess({"model": "fake", "device": "cpu", **settings}, environment or {})
    try:
        yield running
    finally:
        running.close()
