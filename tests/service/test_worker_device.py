"""A device in a process of its own: gives what one of this process gives, breaks alone, and can be started again."""

import gc
import os
import pickle
import queue
import signal
import socket
import threading
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from service_fakes import (
    BLUE,
    GREEDY,
    GREEN,
    HELD,
    HUGE,
    LETHAL,
    POISON,
    STICKY,
    FakePredictor,
    load_cuda,
    load_faulty,
    picture,
)

from dsg.model.network.predictor import Begun, PreparedImage
from dsg.service import worker_device
from dsg.service.batching import Batcher
from dsg.service.devices import DeviceLost, OutOfMemory, Ran, WorkerDied
from dsg.service.local_device import LocalDevice, Running
from dsg.service.metrics import Metrics
from dsg.service.models import ServedModel
from dsg.service.worker import Asked, Worker
from dsg.service.worker_device import WorkerDevice

WAIT = 120
FAR = 1e12


def prepared(colour: tuple[int, int, int] | None = None, left: int = 20) -> PreparedImage:
    image = picture((left, 10, 60, 40), colour=GREEN)
    if colour is not None:
        image.paste(colour, (0, 0, 96, 1))
    return FakePredictor().prepare(np.array(image))


def shared(device: WorkerDevice, *pictures: PreparedImage) -> list[PreparedImage]:
    return [device.share(one) for one in pictures]


def test_it_finds_what_a_device_of_this_process_finds(device: WorkerDevice) -> None:
    local = LocalDevice("cpu", load_faulty)
    local.load(0, "fake")
    pictures = [prepared(left=left) for left in range(5, 50, 5)]
    expected = local.begin(0, pictures, 0.25)().detections
    done = threading.Event()
    ran = device.begin(0, shared(device, *pictures), 0.25, done.set)()
    assert done.wait(60)
    assert len(ran.detections) == len(expected) == 9 and ran.seconds > 0 and ran.memory == {}
    for found, wanted in zip(ran.detections, expected, strict=True):
        for name in ("boxes", "scores", "labels", "mask_probs"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name).numpy())
        assert (found.image_size, found.rle()) == (wanted.image_size, wanted.rle())


def test_two_batches_at_once_are_answered_each_on_its_own(device: WorkerDevice) -> None:
    first = device.begin(0, shared(device, prepared(left=5)), 0.0)
    second = device.begin(0, shared(device, prepared(left=45)), 0.0)
    assert second().detections[0].boxes[0, 0] == 45
    assert first().detections[0].boxes[0, 0] == 5


class Slow:
    """Stands for the device of a worker, and for each of its batches: the test says when one is done."""

    name = "cpu"

    def __init__(self) -> None:
        self.launched: queue.Queue[tuple[int, threading.Event]] = queue.Queue()

    def launch(self, model: int, pictures: list, threshold: float) -> SimpleNamespace:
        done = threading.Event()

        def end(since: float, with_memory: bool) -> Ran:
            assert done.wait(WAIT)
            return Ran([], float(model), {}, launched=2.0, freed=3.0)

        self.launched.put((model, done))
        return SimpleNamespace(is_done=done.is_set, end=end)

    def is_memory_due(self) -> bool:
        return False


def test_a_worker_has_the_next_batch_wait_behind_the_one_that_runs() -> None:
    (here, there), slow = socket.socketpair(), Slow()
    connection, no_pictures = Connection(here.detach()), socket.socket()
    with connection, no_pictures:
        worker = Worker(Connection(there.detach()), no_pictures, slow)  # type: ignore[arg-type]
        threading.Thread(target=worker.work, daemon=True).start()
        for number in range(3):
            worker.ask(Asked(number, number, [], 0.0))
        (first, first_done), (second, second_done) = (slow.launched.get(timeout=WAIT) for _ in range(2))
        assert (first, second) == (0, 1)
        with pytest.raises(queue.Empty):  # two at a time, no more
            slow.launched.get(timeout=0.05)
        second_done.set()  # which changes nothing: answers keep their order
        first_done.set()
        for number in range(2):
            assert pickle.loads(connection.recv_bytes()) == (number, "done", Ran([], float(number), {}, 2.0, 3.0))
        third, third_done = slow.launched.get(timeout=WAIT)
        third_done.set()
        assert third == 2 and pickle.loads(connection.recv_bytes())[:2] == (2, "done")


class Ring:
    """A model that refers to itself, as networks do."""

    info = SimpleNamespace(hash="abc")

    def __init__(self) -> None:
        self.own = self


def test_what_a_worker_has_loaded_is_not_searched_for_rings_until_it_is_forgotten() -> None:
    (here, there), models = socket.socketpair(), {}

    def load(number: int, source: str) -> Ring:
        return models.setdefault(number, Ring())

    device = SimpleNamespace(name="cpu", load=load, forget=models.pop)
    connection, no_pictures = Connection(here.detach()), socket.socket()
    with connection, no_pictures:
        worker = Worker(Connection(there.detach()), no_pictures, device)  # type: ignore[arg-type]
        gone = weakref.ref(load(0, "a"))
        try:
            worker._load(7, 0, "a")
            assert pickle.loads(connection.recv_bytes()) == (7, "done", "abc")
            assert gc.get_freeze_count() > 1000 and not any(one is models for one in gc.get_objects())
            worker._load(8, 1, "b")
            worker._forget(0)
            assert gone() is None and gc.get_freeze_count() > 1000
        finally:
            gc.unfreeze()


def test_an_error_that_shows_while_a_batch_runs_is_told_at_its_end() -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    event = SimpleNamespace(query=broken, synchronize=broken)
    predictor = SimpleNamespace(begin=lambda pictures, threshold: Begun(list, event), device="cpu")
    running = Running(predictor, [], 0.0)  # type: ignore[arg-type]
    assert running.is_done()
    with pytest.raises(DeviceLost, match="illegal memory access"):
        running.end()


def test_a_device_is_free_before_what_it_found_is_looked_at() -> None:
    at: dict[str, float] = {}

    def say(name: str) -> list:
        at[name] = time.monotonic()
        return []

    event = SimpleNamespace(query=lambda: "freed" in at, synchronize=lambda: say("freed"))
    for own in (event, None):
        at.clear()
        begun = Begun(lambda: say("found"), own)
        begin = lambda pictures, threshold, begun=begun: say("begun") or begun  # noqa: E731
        running = Running(SimpleNamespace(begin=begin, device="cpu"), [], 0.0)  # type: ignore[arg-type]
        assert running.is_done() == (own is None)
        ran = running.end()
        assert at["begun"] <= ran.launched <= ran.freed
        assert at["freed"] <= ran.freed <= at["found"] if own is not None else at["found"] <= ran.freed


@pytest.mark.parametrize(
    ("colour", "error", "message"),
    [
        (HUGE, OutOfMemory, "CUDA out of memory"),
        (STICKY, DeviceLost, "illegal memory access"),
        (POISON, RuntimeError, r"RuntimeError: a picture that this network cannot stand(?s:.*)line \d+, in end"),
    ],
)
def test_errors_cross_as_what_they_are(
    device: WorkerDevice, colour: tuple[int, int, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        device.begin(0, shared(device, prepared(colour)), 0.0)()
    assert len(device.begin(0, shared(device, prepared()), 0.0)().detections) == 1


def test_a_model_that_does_not_load_is_one_line(device: WorkerDevice, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_text("broken")
    with pytest.raises(ValueError, match=r"bad.safetensors is no checkpoint$"):
        device.load(1, str(path))


def test_killed_it_says_so_and_starts_again_with_its_models(device: WorkerDevice, tmp_path: Path) -> None:
    path = tmp_path / "second.safetensors"
    path.write_text("version 1")
    device.load(2, str(path))
    os.kill(device.process_id, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="status -9"):
        device.begin(0, shared(device, prepared()), 0.0)()
    device.restart()
    for model in (0, 2):
        assert len(device.begin(model, shared(device, prepared()), 0.0)().detections) == 1
    path.write_text("version 2")
    with pytest.raises(ValueError, match="changed"):  # it would answer as another model than it says
        device.restart()
    device.forget(2)
    assert len(device.begin(0, shared(device, prepared()), 0.0)().detections) == 1


def test_killed_with_nothing_to_run_it_says_so_at_once_and_once(device: WorkerDevice) -> None:
    said: queue.Queue[WorkerDied] = queue.Queue()
    device.when_died = said.put
    os.kill(device.process_id, signal.SIGKILL)
    assert "status -9" in str(said.get(timeout=WAIT))
    with pytest.raises(WorkerDied, match="status -9"):
        device.begin(0, shared(device, prepared()), 0.0)()
    device.restart()
    assert len(device.begin(0, shared(device, prepared()), 0.0)().detections) == 1
    assert said.empty()


def test_a_worker_that_hangs_is_killed_and_what_hangs_it_fails_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("TEST_HELD", str(tmp_path / "pipe"))  # which nobody opens for writing
    monkeypatch.setattr(worker_device, "_BATCH_S", 3.0)
    device, metrics = WorkerDevice("cpu", load_faulty, threads=1), Metrics()
    batcher = Batcher([device], max_batch=8, max_batch_pixels=10**9, ageing_s=1.0, metrics=metrics)
    device.start()
    device.load(0, "fake")
    batcher.start()
    model = ServedModel("fake", 0, load_faulty("fake", None).info, FakePredictor().prepare)
    try:
        os.kill(device.process_id, signal.SIGSTOP)  # hangs with whatever it has; one of these hangs a worker alone
        futures = batcher.submit(model, shared(device, prepared(left=5), prepared(HELD), prepared(left=45)), FAR)
        assert [futures[number].result(WAIT).detections.boxes[0, 0] for number in (0, 2)] == [5, 45]
        with pytest.raises(WorkerDied):
            futures[1].result(WAIT)
        assert metrics.registry.get_sample_value("dsg_worker_deaths_total", {"device": "cpu"}) == 2
        again = batcher.submit(model, shared(device, prepared()), FAR)
        assert again[0].result(WAIT).batch_size == 1 and batcher.fault is None
    finally:
        batcher.close(WAIT)
        device.close()


def test_a_load_may_take_longer_than_any_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker_device, "_BATCH_S", 0.01)  # the import of torch alone takes longer
    device = WorkerDevice("cpu", load_faulty, threads=1)
    device.start()
    device.load(0, "fake")
    device.close()


def test_a_picture_that_kills_workers_fails_alone(device: WorkerDevice) -> None:
    metrics = Metrics()
    batcher = Batcher([device], max_batch=8, max_batch_pixels=10**9, ageing_s=1.0, metrics=metrics)
    model = ServedModel("fake", 0, load_faulty("fake", None).info, FakePredictor().prepare)
    pictures = shared(device, prepared(left=5), prepared(LETHAL), prepared(left=45))
    futures = batcher.submit(model, pictures, FAR)
    batcher.start()
    assert futures[0].result(WAIT).detections.boxes[0, 0] == 5
    assert futures[2].result(WAIT).detections.boxes[0, 0] == 45
    with pytest.raises(WorkerDied):
        futures[1].result(WAIT)
    assert metrics.registry.get_sample_value("dsg_worker_deaths_total", {"device": "cpu"}) == 2
    again = batcher.submit(model, shared(device, prepared(), prepared(GREEDY)), FAR)
    assert [future.result(WAIT).batch_size for future in again] == [1, 1]
    assert batcher.fault is None and batcher.is_up
    batcher.close(WAIT)


def test_a_blue_picture_is_blue(device: WorkerDevice) -> None:
    image = np.array(picture((20, 10, 60, 40), colour=BLUE))
    (found,) = device.begin(0, shared(device, FakePredictor().prepare(image)), 0.0)().detections
    assert found.labels.tolist() == [3]


def test_thread_or_process_is_chosen_by_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsg.service import choose_devices
    from dsg.service.settings import Settings

    def kinds(**settings: str) -> list[tuple[str, str]]:
        made = choose_devices.choose_devices(Settings(**settings), load_faulty)
        return [(type(one).__name__.removesuffix("Device"), one.name) for one in made]

    monkeypatch.setattr(choose_devices, "_cuda_devices", lambda: 0)
    assert kinds() == [("Local", "default")]
    assert kinds(device="cpu", workers="process") == [("Worker", "cpu")]
    assert kinds(devices="cpu, cpu") == [("Worker", "cpu")] * 2
    with pytest.raises(ValueError, match="no GPU is to be seen"):
        kinds(devices="all")
    monkeypatch.setattr(choose_devices, "_cuda_devices", lambda: 2)
    assert kinds() == [("Worker", "cuda")]
    assert kinds(devices="all") == [("Worker", "cuda:0"), ("Worker", "cuda:1")]
    assert kinds(device="cuda:1", workers="thread") == [("Local", "cuda:1")]
    assert kinds(model="compiled.pt2") == [("Local", "cuda")]
    with pytest.raises(ValueError, match="both set"):
        kinds(device="cpu", devices="all")


def test_gpu_errors_are_told_apart() -> None:
    def raising(error: Exception) -> SimpleNamespace:
        def begin(pictures: list, threshold: float) -> Begun:
            raise error

        return SimpleNamespace(begin=begin, device="cpu")

    class OutOfMemoryError(RuntimeError):
        pass

    for error in (MemoryError(), OutOfMemoryError("x"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        with pytest.raises(OutOfMemory):
            Running(raising(error), [], 0.0)
    with pytest.raises(OutOfMemory):  # CUDA's own way to say it: the device goes on
        Running(raising(RuntimeError("CUDA error: out of memory")), [], 0.0)
    with pytest.raises(KeyError):
        Running(raising(KeyError("x")), [], 0.0)


@pytest.mark.gpu
def test_a_gpu_that_is_lost_is_told_from_one_that_is_not() -> None:
    device = WorkerDevice("cuda", load_cuda)
    device.start()
    device.load(0, "fake")
    ran = device.begin(0, shared(device, prepared(), prepared()), 0.0)()
    assert len(ran.detections) == 2 and ran.memory["total"] > ran.memory["free"] > 0
    with pytest.raises(DeviceLost):
        device.begin(0, shared(device, prepared(STICKY)), 0.0)()
    with pytest.raises(DeviceLost):  # and it stays so
        device.begin(0, shared(device, prepared()), 0.0)()
    device.restart()
    assert len(device.begin(0, shared(device, prepared()), 0.0)().detections) == 1
    device.close()
