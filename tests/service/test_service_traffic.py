"""Many clients at once, and what happens when things go wrong in between."""

import asyncio
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from service_fakes import BLUE, CATEGORY_IDS, POISON, RELOAD_KEY, FakePredictor, Server, encoded, picture, serving

from dsg.service.devices import OutOfMemory, WorkerDied

GOOD = encoded(picture((20, 10, 60, 40)))
PNG = {"Content-Type": "image/png"}


def at_once(server: Server, bodies: list[bytes], **options) -> list[Future]:
    """Post from one thread each; the futures give the responses."""
    pool = ThreadPoolExecutor(len(bodies))
    futures = [
        pool.submit(httpx.post, f"{server.base_url}/segment", content=body, headers=PNG, timeout=60, **options)
        for body in bodies
    ]
    pool.shutdown(wait=False)
    return futures


def occupy(server: Server) -> Future:
    """A request that stays on the device until the gate opens; its batch is the second (the first was the warm-up)."""
    server.predictor.wait_entered()  # the warm-up
    server.predictor.gate.clear()
    (future,) = at_once(server, [GOOD])
    server.predictor.wait_entered()
    return future


def test_fifty_clients_each_get_their_own_answer() -> None:
    async def client_of(number: int, http: httpx.AsyncClient) -> None:
        for turn in range(4):
            x, y = number % 10 * 8, number // 10 * 8 + turn
            size = (128 + 40 * (turn % 2), 96)
            data = encoded(picture((x, y, x + 20, y + 12), size=size))
            response = await http.post("/segment", content=data, headers=PNG)
            assert response.status_code == 200, response.text
            document = response.json()
            assert (document["images"][0]["width"], document["images"][0]["height"]) == size
            assert [one["bbox"] for one in document["annotations"]] == [[x, y, 20, 12]]

    async def all_clients(url: str) -> None:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            await asyncio.gather(*(client_of(number, http) for number in range(50)))

    with serving() as server:
        asyncio.run(all_clients(server.base_url))
        server.await_metric("dsg_request_duration_seconds_count", 200, route="/segment", method="POST", status="200")
        assert server.metric("dsg_batch_size_sum") == 200
        assert server.metric("dsg_batch_size_count") < 200  # some ran together
        assert server.metric("dsg_accepted_pictures") == 0


def test_what_arrives_while_the_device_is_busy_runs_together() -> None:
    with serving(max_batch=4) as server:
        first = occupy(server)
        others = at_once(server, [GOOD] * 6)
        server.await_metric("dsg_queued_pictures", 6)
        server.predictor.gate.set()
        assert {future.result().status_code for future in [first, *others]} == {200}
        assert [len(batch) for batch in server.predictor.batches] == [1, 1, 4, 2]
        assert server.metric("dsg_batch_size_bucket", le="4.0") - server.metric("dsg_batch_size_bucket", le="3.0") == 1


def test_the_network_is_told_the_score_threshold_of_a_request() -> None:
    with serving() as server:
        assert server.post(GOOD, params={"score_threshold": 0.75}).status_code == 200
        assert server.post(GOOD).status_code == 200
        # the warm-up takes everything, so that it makes masks
        assert server.predictor.thresholds == [0.0, 0.75, server.predictor.info.score_threshold]


def test_thresholds_of_classes_are_the_default_of_a_request() -> None:
    both = picture((20, 10, 60, 40))  # red scores .9, blue .3
    both.paste(BLUE, (70, 10, 90, 30))
    predictor = FakePredictor()
    predictor.info = replace(predictor.info, class_thresholds=(0.95, 0.5, 0.25), class_precision=0.8)
    with serving(lambda name, device: predictor) as server:
        found = server.post(encoded(both)).json()["annotations"]
        assert [one["category_id"] for one in found] == [CATEGORY_IDS[2]]
        asked = server.post(encoded(both), params={"score_threshold": 0.5}).json()["annotations"]
        assert [one["category_id"] for one in asked] == [CATEGORY_IDS[0]]
        assert predictor.thresholds == [0.0, 0.25, 0.5]  # the lowest is what the network is told
        (model,) = server.client.get("/models").json()["models"]
        assert (model["class_thresholds"], model["class_precision"]) == ([0.95, 0.5, 0.25], 0.8)


def test_a_poisoned_picture_fails_alone() -> None:
    poison = encoded(picture((0, 0, 96, 1), colour=POISON))
    with serving() as server:
        first = occupy(server)
        others = at_once(server, [GOOD, GOOD, poison, GOOD])
        server.await_metric("dsg_queued_pictures", 4)
        server.predictor.gate.set()
        assert [future.result().status_code for future in [first, *others]] == [200, 200, 200, 500, 200]
        assert len(server.predictor.batches[2]) == 4
        assert server.metric("dsg_batch_splits_total", cause="error") >= 1


def test_a_full_queue_sheds_and_recovers() -> None:
    with serving(max_queue=3, max_pictures=2) as server:
        accepted = [occupy(server), *at_once(server, [GOOD] * 2)]
        server.await_metric("dsg_queued_pictures", 2)
        response = server.post(GOOD)
        assert response.status_code == 429
        assert response.json()["reason"] == "queue_full"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        server.predictor.gate.set()
        assert [future.result().status_code for future in accepted] == [200] * 3
        server.await_metric("dsg_accepted_pictures", 0)
        assert server.post(GOOD).status_code == 200
        assert server.metric("dsg_problems_total", reason="queue_full") == 1


def test_several_pictures_need_as_many_places() -> None:
    with serving(max_queue=2, max_pictures=2) as server:
        first = occupy(server)
        files = [("image", ("a.png", GOOD, "image/png"))] * 2
        assert server.client.post("/segment", files=files).status_code == 429
        server.predictor.gate.set()
        assert first.result().status_code == 200
        server.await_metric("dsg_accepted_pictures", 0)
        assert server.client.post("/segment", files=files).status_code == 200


def test_past_its_deadline_a_request_is_answered_and_its_work_dropped() -> None:
    with serving() as server:
        first = occupy(server)
        response = server.post(GOOD, headers={"X-Timeout-Ms": "40"})
        assert response.status_code == 504
        assert response.json()["reason"] == "deadline_passed"
        server.await_metric("dsg_queued_pictures", 0)
        server.predictor.gate.set()
        assert first.result().status_code == 200
        assert server.post(GOOD).status_code == 200
        assert len(server.predictor.batches) == 3  # the warm-up, the first, the last


def test_a_deadline_passed_while_running_is_answered_at_once() -> None:
    with serving(deadline_ms=2000) as server:
        assert occupy(server).result().status_code == 504  # the device is still at it
        server.predictor.gate.set()
        server.await_metric("dsg_accepted_pictures", 0)


def test_a_client_that_hangs_up_leaves_the_queue() -> None:
    with serving() as server:
        first = occupy(server)
        address = (server.client.base_url.host, server.client.base_url.port)
        head = f"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(GOOD)}\r\n\r\n"
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head.encode() + GOOD)
            server.await_metric("dsg_queued_pictures", 1)
        server.await_metric("dsg_queued_pictures", 0)
        server.predictor.gate.set()
        assert first.result().status_code == 200
        server.await_metric("dsg_request_duration_seconds_count", 1, route="/segment", method="POST", status="499")
        assert server.metric("dsg_problems_total", reason="client_gone") == 1
        assert len(server.predictor.batches) == 2


def test_a_client_that_hangs_up_while_sending_leaves_nothing() -> None:
    with serving() as server:
        address = (server.client.base_url.host, server.client.base_url.port)
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(
                b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 999\r\n\r\nx"
            )
        server.await_metric("dsg_request_duration_seconds_count", 1, route="/segment", method="POST", status="499")
        assert server.post(GOOD).status_code == 200


def files_of(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.safetensors").write_bytes(b"")


def test_reload_under_load_drops_nothing(tmp_path: Path) -> None:
    files_of(tmp_path, "fake")
    made: list[FakePredictor] = []

    def load(source: str, device: str | None) -> FakePredictor:
        assert source == str(tmp_path / "fake.safetensors")
        made.append(FakePredictor("fake", digest=f"version{len(made)}"))
        return made[-1]

    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    with serving(load, model_dir=tmp_path, reload_key=RELOAD_KEY) as server:
        made[0].wait_entered()
        made[0].gate.clear()
        old = at_once(server, [GOOD] * 3)
        made[0].wait_entered()
        server.await_metric("dsg_accepted_pictures", 3)
        pool = ThreadPoolExecutor(1)
        reloading = pool.submit(server.client.post, "/models/reload", json={"model": "fake"}, headers=headers)
        pool.shutdown(wait=False)
        made[0].gate.set()
        response = reloading.result(60)
        assert response.status_code == 200, response.text
        assert response.json() == {"model": "fake", "hash": "version1"}
        for future in old:
            assert future.result().status_code == 200
            assert future.result().json()["info"]["hash"] == "version0"
        assert server.post(GOOD).json()["info"]["hash"] == "version1"
        assert [one["hash"] for one in server.client.get("/models").json()["models"]] == ["version1"]


@pytest.mark.parametrize("error", [WorkerDied("killed"), OutOfMemory("2 GiB")])
def test_a_reload_that_fails_for_another_reason_than_its_file_may_be_asked_for_again(
    tmp_path: Path, error: Exception
) -> None:
    files_of(tmp_path, "fake")
    failures: list[Exception] = []

    def load(source: str, device: str | None) -> FakePredictor:
        if failures:
            raise failures.pop()
        return FakePredictor("fake")

    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    with serving(load, model_dir=tmp_path, reload_key=RELOAD_KEY) as server:
        failures.append(error)
        response = server.client.post("/models/reload", json={"model": "fake"}, headers=headers)
        assert (response.status_code, response.json()["reason"]) == (503, "not_reloaded")
        assert response.headers["retry-after"] and server.post(GOOD).status_code == 200
        assert server.client.post("/models/reload", json={"model": "fake"}, headers=headers).status_code == 200


def test_reload_takes_names_of_files_in_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    files_of(folder, "fake", "second", "broken")
    files_of(tmp_path, "outside")

    def load(source: str, device: str | None) -> FakePredictor:
        if "broken" in source:
            raise ValueError(f"{source} is not a checkpoint")
        return FakePredictor(Path(source).stem)

    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    with serving(load, model_dir=folder, reload_key=RELOAD_KEY) as server:
        for name in ("../outside", str(tmp_path / "outside"), "missing", "", ".", "..", "a/b", "fake\0", "é" * 300):
            response = server.client.post("/models/reload", json={"model": name}, headers=headers)
            assert response.status_code == 422, name
            assert response.json()["reason"] == "unknown_model" and str(tmp_path) not in response.text.replace(name, "")
        response = server.client.post("/models/reload", json={"model": "broken"}, headers=headers)
        assert (response.status_code, response.json()["reason"]) == (422, "broken_model")
        assert str(tmp_path) not in response.text
        for name in ("second", "second.safetensors"):
            response = server.client.post("/models/reload", json={"model": name}, headers=headers)
            assert response.status_code == 200, response.text
            assert response.json() == {"model": "second", "hash": "0123abcd"}
        assert [one["name"] for one in server.client.get("/models").json()["models"]] == ["fake", "second"]
        assert server.post(GOOD).json()["info"]["model"] == "fake"
        assert server.post(GOOD, params={"model": "second"}).json()["info"]["model"] == "second"


def test_reload_without_a_folder() -> None:
    with serving(reload_key=RELOAD_KEY) as server:
        headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
        response = server.client.post("/models/reload", json={"model": "fake"}, headers=headers)
        assert (response.status_code, response.json()["reason"]) == (422, "no_model_dir")


def test_a_request_in_decode_is_dropped_when_its_deadline_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    with serving(decode_workers=1) as server:
        prepare = server.predictor.prepare
        monkeypatch.setattr(server.predictor, "prepare", lambda image: opened.wait(60) and prepare(image))
        (slow,) = at_once(server, [GOOD])
        server.await_metric("dsg_accepted_pictures", 1)
        response = server.post(GOOD, headers={"X-Timeout-Ms": "40"})  # its turn to decode does not come
        assert response.status_code == 504
        opened.set()
        assert slow.result().status_code == 200
        assert server.metric("dsg_batch_size_sum") == 1
