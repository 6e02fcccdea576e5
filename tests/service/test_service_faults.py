"""Faults injected into a real server under load, and what clients see; docs/service.md has the table."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from service_fakes import GREEDY, HELD, HUGE, LETHAL, POISON, RELOAD_KEY, STICKY, encoded, faulty_picture, picture
from service_process import ServerProcess, server_process

PNG = {"Content-Type": "image/png"}
BOX = [20, 10, 40, 30]
GOOD = encoded(picture((20, 10, 60, 40)))


def post(server: ServerProcess, data: bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/segment", content=data, headers=PNG, timeout=120)


def is_right(response: httpx.Response) -> bool:
    return response.status_code == 200 and [one["bbox"] for one in response.json()["annotations"]] == [BOX]


def flood(server: ServerProcess, bodies: list[bytes]) -> list[httpx.Response]:
    """Post all at once, one thread each; the responses in their order."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: post(server, body), bodies))


class Load:
    """Eight clients that ask until told to stop; what they saw is counted."""

    def __init__(self, server: ServerProcess) -> None:
        self.seen: Counter = Counter()
        self._server = server
        self._stopping = threading.Event()
        self._some = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._ask) for _ in range(8)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        self.wait_answers(16)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)

    def wait_answers(self, count: int) -> None:
        for _ in range(count):
            assert self._some.acquire(timeout=120)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._server.url, headers=PNG, timeout=120) as client:
            while not self._stopping.is_set():
                try:
                    response = client.post("/segment", content=GOOD)
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
                    # The server is gone, and says so by not being there; or it closed an idle connection just as a
                    # request was sent into it, which it then never read.
                    self.seen["refused"] += 1
                    return
                right = is_right(response)
                reason = "" if response.status_code == 200 else response.json()["reason"]
                self.seen["right" if right else f"{response.status_code} {reason}"] += 1
                self._some.release()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A named pipe: whoever opens it for reading waits until the test opens it for writing."""
    path = tmp_path_factory.mktemp("held") / "pipe"
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def server(held: Path) -> Iterator[ServerProcess]:
    """Its device is a process of its own."""
    with server_process({"TEST_HELD": str(held)}, workers="process", max_batch=8) as running:
        yield running


def batch_of(server: ServerProcess, held: Path, bodies: list[bytes]) -> list[httpx.Response]:
    """Answers to pictures that all wait when the device becomes free, so that they run together."""
    with ThreadPoolExecutor(2 + len(bodies)) as pool:
        holding = []
        for number in (1, 2):  # one that runs, and one that is sent ahead of its end: no more are taken then
            holding.append(pool.submit(post, server, faulty_picture(HELD, size=(200, 64))))
            _await_queue(server, accepted=number, queued=0)
        rest = [pool.submit(post, server, body) for body in bodies]
        _await_queue(server, accepted=2 + len(bodies), queued=len(bodies))
        for one in holding:
            while not one.done():
                with suppress(OSError):  # nobody waits at the pipe now
                    os.close(os.open(held, os.O_WRONLY | os.O_NONBLOCK))
            assert one.result().status_code == 200
        return [one.result() for one in rest]


def _await_queue(server: ServerProcess, accepted: int, queued: int) -> None:
    """Wait until so many pictures are accepted, all of them decoded, and so many of them not taken by a device."""
    while True:
        metrics = server.metrics()
        found = (metrics["dsg_accepted_pictures"], metrics["dsg_queued_pictures"], metrics["dsg_in_flight_bytes"])
        if found == (accepted, queued, 0):
            return


def metric_grows(server: ServerProcess, name: str) -> Callable[[], float]:
    before = server.metrics().get(name, 0.0)
    return lambda: server.metrics().get(name, 0.0) - before


def test_out_of_memory_at_a_batch(server: ServerProcess, held: Path) -> None:
    splits = metric_grows(server, 'dsg_batch_splits_total{cause="out_of_memory"}')
    responses = batch_of(server, held, [GOOD, faulty_picture(GREEDY), GOOD, GOOD])
    assert all(map(is_right, responses))
    assert splits() >= 1


def test_a_picture_that_fits_in_no_memory(server: ServerProcess, held: Path) -> None:
    responses = batch_of(server, held, [GOOD, faulty_picture(HUGE), GOOD])
    assert is_right(responses[0]) and is_right(responses[2])
    assert (responses[1].status_code, responses[1].json()["reason"]) == (503, "out_of_memory")
    assert int(responses[1].headers["retry-after"]) > 0
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_an_exception_in_the_model(server: ServerProcess, held: Path) -> None:
    responses = batch_of(server, held, [GOOD, GOOD, faulty_picture(POISON), GOOD])
    assert [one.status_code for one in responses] == [200, 200, 500, 200]
    event = server.await_event("request failed")
    assert event["request_id"] == responses[2].headers["x-request-id"]
    assert "cannot stand" in event["exception"] and "service_fakes.py" in event["exception"]  # the worker's own lines


def test_a_killed_worker_loses_nothing(server: ServerProcess) -> None:
    deaths = metric_grows(server, 'dsg_worker_deaths_total{device="cpu"}')
    with Load(server) as load:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        server.await_event("worker died")
        load.wait_answers(24)
    assert deaths() == 1
    assert set(load.seen) <= {"right", "503 restarting"} and load.seen["right"] > 16
    assert server.workers() != [worker] and is_right(post(server, GOOD))


def test_a_worker_killed_while_it_is_idle_is_started_again_without_a_request(server: ServerProcess) -> None:
    deaths = metric_grows(server, 'dsg_worker_deaths_total{device="cpu"}')
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    event = server.await_event("worker died")
    assert event["pictures"] == 0 and "status -9" in event["error"]
    while httpx.get(f"{server.url}/readyz").status_code != 200:
        assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert deaths() == 1 and server.metrics()['dsg_device_up{device="cpu"}'] == 1
    assert server.workers() != [worker] and is_right(post(server, GOOD))


def test_a_worker_killed_while_it_starts_again_loses_nothing(server: ServerProcess) -> None:
    deaths = metric_grows(server, 'dsg_worker_deaths_total{device="cpu"}')
    with Load(server) as load:
        first = server.workers()
        os.kill(first[0], signal.SIGKILL)
        server.await_event("worker died")
        second: list[int] = []
        while second in ([], first):
            with suppress(FileNotFoundError):  # a thread of the server ended while it was looked at
                second = server.workers()
        os.kill(second[0], signal.SIGKILL)  # it has not imported torch yet
        assert server.await_event("worker died")["pictures"] == 0
        load.wait_answers(24)
    assert deaths() == 2
    assert set(load.seen) <= {"right", "503 restarting"} and load.seen["right"] > 16
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_picture_that_kills_workers(server: ServerProcess, held: Path) -> None:
    responses = batch_of(server, held, [GOOD, faulty_picture(LETHAL), GOOD])
    assert is_right(responses[0]) and is_right(responses[2])
    assert responses[1].status_code == 500
    while httpx.get(f"{server.url}/readyz").status_code != 200:  # its worker is being started once more
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_cuda_error_that_stays(held: Path) -> None:
    with server_process(workers="thread") as server:
        assert is_right(post(server, GOOD))
        response = post(server, faulty_picture(STICKY))
        assert (response.status_code, response.json()["reason"]) == (503, "unhealthy")
        for path in ("/healthz", "/readyz"):
            assert httpx.get(f"{server.url}{path}").status_code == 503
        assert post(server, GOOD).json()["reason"] == "unhealthy"


def test_sigterm_under_load() -> None:
    with server_process() as server:
        with Load(server) as load:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(120) == 0
        # Nothing that was accepted is lost: answers, then refusals that say why, then nobody at the door.
        assert set(load.seen) <= {"right", "503 draining", "refused"}, load.seen
        assert load.seen["right"] >= 16


def test_reload_under_load(tmp_path: Path) -> None:
    (tmp_path / "fake.safetensors").write_text("version 0")
    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    with server_process(workers="process", model_dir=tmp_path, reload_key=RELOAD_KEY) as server:
        with Load(server) as load:
            for version in range(1, 4):
                (tmp_path / "fake.safetensors").write_text(f"version {version}")
                response = httpx.post(
                    f"{server.url}/models/reload", json={"model": "fake"}, headers=headers, timeout=120
                )
                assert response.json() == {"model": "fake", "hash": f"version {version}"}
                load.wait_answers(8)
            (tmp_path / "fake.safetensors").write_text("broken")
            broken = httpx.post(f"{server.url}/models/reload", json={"model": "fake"}, headers=headers, timeout=120)
            assert broken.json()["reason"] == "broken_model"
            load.wait_answers(8)
        assert set(load.seen) == {"right"}
        assert post(server, GOOD).json()["info"]["hash"] == "version 3"
        assert server.metrics()['dsg_model_reloads_total{result="swapped"}'] == 3


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """That of the models, and the one for temporary files."""
    made = tmp_path / "models", tmp_path / "temporary"
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("left", ["version 2", "broken", None])
def test_a_worker_that_dies_after_its_models_file_has_changed(
    folders: tuple[Path, Path], devices: str, left: str | None
) -> None:
    folder, temporary = folders
    file = folder / "fake.safetensors"
    file.write_text("version 1")
    settings = {"device": None, "devices": devices, "workers": "process", "model_dir": folder}
    with server_process({"TMPDIR": str(temporary)}, **settings) as server:
        if left is None:
            file.unlink()
        else:
            file.write_text(left)
        os.kill(server.workers()[0], signal.SIGKILL)
        server.await_event("worker died")
        while (answer := post(server, GOOD)).status_code == 503:
            assert answer.json()["reason"] == "restarting"
        for _ in range(8):
            assert post(server, GOOD).json()["info"]["hash"] == "version 1"
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
    assert not list(temporary.glob("dsg-*"))


def test_copies_of_models_go_with_them(folders: tuple[Path, Path]) -> None:
    folder, temporary = folders
    (folder / "fake.safetensors").write_text("version 1")
    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    with server_process(
        {"TMPDIR": str(temporary)}, workers="process", model_dir=folder, reload_key=RELOAD_KEY
    ) as server:
        for text, status in (("version 2", 200), ("broken", 422), ("version 3", 200)):
            (folder / "fake.safetensors").write_text(text)
            answer = httpx.post(f"{server.url}/models/reload", json={"model": "fake"}, headers=headers, timeout=120)
            assert answer.status_code == status
        assert post(server, GOOD).json()["info"]["hash"] == "version 3"  # the request before it had the old one
        assert [path.read_text() for path in temporary.glob("dsg-model-*/*")] == ["version 3"]


def test_a_full_disk_for_the_log() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    port = _free_port()
    with open("/dev/full", "w") as full:
        server = ServerProcess({"model": "fake", "device": "cpu", "port": port}, {}, stderr=full)
    server.url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{server.url}/readyz").status_code == 200:
                    break
            except httpx.ConnectError:
                assert server.process.poll() is None
        assert all(map(is_right, flood(server, [GOOD] * 8)))
        assert post(server, faulty_picture(POISON)).status_code == 500  # its traceback has nowhere to go
        assert is_right(post(server, GOOD))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
    finally:
        server.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.gpu
def test_another_process_takes_the_memory_of_the_card() -> None:
    """It takes nearly all, so that batches and perhaps single pictures do not fit; then it gives it back."""
    hog = (
        "import torch; free, _ = torch.cuda.mem_get_info();"
        "kept = torch.empty(int(free) - 300_000_000, dtype=torch.uint8, device='cuda');"
        "torch.cuda.synchronize(); print('taken', flush=True); input()"
    )
    chance = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8, generator=chance).numpy()
    photo = encoded(Image.fromarray(noise))
    with server_process(model="dsg_lite0_coco", device="cuda") as server:
        assert post(server, photo).status_code == 200
        process = subprocess.Popen(
            [sys.executable, "-c", hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "taken\n"
        seen = Counter(response.status_code for response in flood(server, [photo] * 24))
        assert set(seen) <= {200, 503}, seen
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        process.communicate("\n")
        assert {response.status_code for response in flood(server, [photo] * 24)} == {200}
