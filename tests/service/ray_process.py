"""The service on Ray as a process of its own, with the same interface as the servers that other tests share."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_process import ServerProcess, server_process

_PATIENCE_S = 60
NEEDS_RAY = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed"),
]


class RayServer:
    """What `service_fakes.Server` offers to tests that only ask, over HTTP alone."""

    def __init__(self, running: ServerProcess) -> None:
        self.running = running
        self.base_url = running.url
        self.client = httpx.Client(base_url=self.base_url, timeout=_PATIENCE_S)

    def post(self, data: Any, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "image/png", **options.pop("headers", {})}
        return self.client.post("/segment", content=data, headers=headers, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all replicas."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        total = 0.0
        for sample, value in self.running.metrics().items():
            match = re.fullmatch(r"(\w+)\{(.*)\}", sample)
            if match and match[1] == name and wanted <= set(match[2].split(",")):
                total += value
        return total

    def await_metric(self, name: str, value: float, **labels: str) -> None:
        """Ask until a metric has a value; the round trips are what passes the time."""
        while self.metric(name, **labels) != value:
            assert self.client.get("/-/healthz").status_code == 200

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        return [pid for pid in descendants(self.running.process.pid) if title(pid).startswith("ray::ServeReplica")]


def descendants(pid: int) -> list[int]:
    """Process ids of all that a process has started, and they have."""
    try:
        tasks = [path / "children" for path in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for path in tasks for child in path.read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def title(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@contextmanager
def on_ray(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[RayServer]:
    """Run the service with two replicas as long as the block does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # replicas find the fakes of the tests by this path
    environment = {"PYTHONPATH": str(Path(__file__).parent), **(environment or {})}
    with server_process(environment, **{"engine": "ray", "replicas": "2", "port": port, **settings}) as running:
        server = RayServer(running)
        try:
            yield server
        finally:
            server.client.close()
            running.process.terminate()
            running.process.wait(_PATIENCE_S)
