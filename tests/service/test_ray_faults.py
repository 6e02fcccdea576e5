"""The service on Ray when replicas die, models change, and it is told to stop."""

import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray_process import NEEDS_RAY, RayServer, descendants, on_ray, title
from service_fakes import HELD, LETHAL, RELOAD_KEY, STICKY, encoded, faulty_picture, picture

pytestmark = NEEDS_RAY

GOOD = encoded(picture((20, 10, 60, 40)))
PNG = {"Content-Type": "image/png"}
_CLIENTS, _EACH = 6, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The replicas' model folder; a pipe that holds a picture until its other end is opened lies there, too."""
    found = tmp_path_factory.mktemp("models")
    os.mkfifo(found / "held")
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RayServer]:
    environment = {"TEST_HELD": str(folder / "held")}
    with on_ray(environment, model="fake", model_dir=str(folder), reload_key=RELOAD_KEY) as running:
        yield running


def await_replicas(server: RayServer, gone: int | None = None) -> None:
    """Until two answer for their metrics, and the one that went is not among them."""
    while len(replicas := set(server.replicas())) != 2 or gone in replicas or server.metric("dsg_device_up") != 2:
        assert server.client.get("/-/healthz").status_code == 200


def check_hint(response: httpx.Response) -> None:
    """Whatever is not an answer is a problem document that says when to try again."""
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) > 0 and response.headers["x-request-id"]
    assert response.json()["status"] == 503


def test_a_replica_killed_under_load_loses_only_what_it_held(server: RayServer) -> None:
    answers: queue.Queue[httpx.Response] = queue.Queue()

    def ask() -> None:
        with httpx.Client(base_url=server.base_url, timeout=60) as client:
            for _ in range(_EACH):
                answers.put(client.post("/segment", content=GOOD, headers=PNG))

    clients = [threading.Thread(target=ask) for _ in range(_CLIENTS)]
    for client in clients:
        client.start()
    seen = [answers.get(timeout=60) for _ in range(2 * _CLIENTS)]
    victim = server.replicas()[0]
    os.kill(victim, signal.SIGKILL)
    for client in clients:
        client.join()
    seen += [answers.get_nowait() for _ in range(_CLIENTS * _EACH - len(seen))]
    statuses = Counter(response.status_code for response in seen)
    for response in seen:
        if response.status_code != 200:
            check_hint(response)
    # At most one request of each client was on its way when the replica died.
    assert statuses[200] >= _CLIENTS * (_EACH - 1), statuses
    await_replicas(server, victim)


def test_a_request_on_a_replica_that_dies_is_told_to_come_again(server: RayServer) -> None:
    before = set(server.replicas())
    response = server.post(faulty_picture(LETHAL))
    check_hint(response)
    assert response.json()["reason"] == "replica_lost"
    assert server.post(GOOD).status_code == 200  # the other one
    await_replicas(server, next(iter(before - set(server.replicas())), None))


def test_a_replica_whose_device_is_lost_is_replaced(server: RayServer) -> None:
    before = set(server.replicas())
    response = server.post(faulty_picture(STICKY))
    check_hint(response)
    assert response.json()["reason"] == "unhealthy"
    while not (gone := before - set(server.replicas())):
        assert server.client.get("/-/healthz").status_code == 200
    await_replicas(server, next(iter(gone)))
    assert {server.post(GOOD).status_code for _ in range(4)} == {200}


def test_a_reload_reaches_every_replica(server: RayServer, folder: Path) -> None:
    (folder / "fake.safetensors").write_text("second")
    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    response = server.client.post("/models/reload", json={"model": "fake"}, headers=headers)
    assert (response.status_code, response.json()) == (200, {"model": "fake", "hash": "second"})
    assert server.metric("dsg_model_info", hash="second") == 2
    # One that comes later has it, too.
    victim = server.replicas()[0]
    os.kill(victim, signal.SIGKILL)
    await_replicas(server, victim)
    assert server.metric("dsg_model_info", hash="second") == 2


def test_a_broken_model_is_refused_and_the_old_one_stays(server: RayServer, folder: Path) -> None:
    (folder / "other.safetensors").write_text("broken")
    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    response = server.client.post("/models/reload", json={"model": "other"}, headers=headers)
    assert response.status_code == 422 and response.json()["reason"] == "broken_model"
    assert {server.post(GOOD).json()["info"]["model"] for _ in range(4)} == {"fake"}


def test_a_new_board_knows_the_replicas(server: RayServer) -> None:
    (board,) = [pid for pid in descendants(server.running.process.pid) if title(pid).startswith("ray::Board")]
    os.kill(board, signal.SIGKILL)
    await_replicas(server)


def test_what_is_in_flight_is_answered_after_sigterm(server: RayServer, folder: Path) -> None:
    answers: queue.Queue[httpx.Response] = queue.Queue()

    def ask() -> None:
        answers.put(httpx.post(f"{server.base_url}/segment", content=faulty_picture(HELD), headers=PNG, timeout=60))

    client = threading.Thread(target=ask)
    client.start()
    server.await_metric("dsg_accepted_pictures", 1)
    server.running.process.terminate()
    server.running.await_event("draining")
    with (folder / "held").open("w"):
        client.join()
    assert answers.get_nowait().status_code == 200
    assert server.running.process.wait(60) == 0
    assert not server.replicas()
