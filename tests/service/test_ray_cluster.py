"""The service on a Ray cluster that was there before and stays; and what is said where there is none."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray_process import NEEDS_RAY, descendants, on_ray, title
from service_fakes import encoded, picture

pytestmark = NEEDS_RAY

GOOD = encoded(picture((20, 10, 60, 40)))
OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def head() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A cluster of one node, and its port."""
    port = free_port()
    options = [f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
    environment = {**os.environ, **OPEN, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout is not None
            while b"Ray runtime started" not in (line := process.stdout.readline()):
                assert line, "the cluster ended"
            yield process, port
        finally:
            process.terminate()
            process.communicate(timeout=60)


def test_the_application_joins_and_leaves_a_cluster(head: tuple[subprocess.Popen[bytes], int]) -> None:
    cluster, port = head
    with on_ray(OPEN, ray_address=f"127.0.0.1:{port}") as server:
        assert {server.post(GOOD).status_code for _ in range(4)} == {200}
        assert not server.replicas(), "replicas are the cluster's, not the command's"
        mine = [pid for pid in descendants(cluster.pid) if title(pid).startswith("ray::ServeReplica")]
        assert len(mine) == 2
        server.running.process.terminate()
        assert server.running.process.wait(60) == 0
        with pytest.raises(httpx.HTTPError):
            server.post(GOOD)
    assert cluster.poll() is None
    assert not [pid for pid in descendants(cluster.pid) if title(pid).startswith("ray::ServeReplica")]


def test_replicas_follow_the_load() -> None:
    with on_ray(replicas="1-2", max_batch=1) as server:
        assert len(server.replicas()) == 1
        stopping = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.base_url, timeout=60) as client:
                while not stopping.is_set():
                    response = client.post("/segment", content=GOOD, headers={"Content-Type": "image/png"})
                    assert response.status_code == 200, response.text

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(ask) for _ in range(8)]
            try:
                while len(server.replicas()) < 2 and not any(client.done() for client in clients):
                    assert server.client.get("/-/healthz").status_code == 200
            finally:
                stopping.set()
            for client in clients:
                client.result()
        assert len(server.replicas()) == 2


def dsg(*arguments: str) -> tuple[int, list[str]]:
    """Exit status and what `dsg serve --engine ray` says."""
    command = [sys.executable, "-m", "dsg.cli", "serve", "--engine", "ray", *arguments]
    ran = subprocess.run(command, env={**os.environ, **OPEN}, capture_output=True, text=True, timeout=300)
    return ran.returncode, ran.stderr.strip().splitlines()


def test_no_cluster_is_one_line() -> None:
    port = free_port()
    status, (line,) = dsg("--address", f"127.0.0.1:{port}")
    assert status == 2 and line == f"dsg: error: no Ray at 127.0.0.1:{port}: Connection refused"


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, (line,) = dsg("--port", str(port))
    assert status == 2 and f"cannot listen on 127.0.0.1:{port}" in line


def test_a_model_that_does_not_load_is_one_line() -> None:
    status, (line,) = dsg("--model", "nothing_like_it", "--port", str(free_port()))
    assert status == 2 and line.startswith("dsg: error: cannot load: no weights 'nothing_like_it'")
