"""A device in a process of its own: gives what one of this process gives, breaks alone, and can be started again."""

import contextlib
import gc
import os
import pickle
import queue
import signal
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from service_fakes import (
    BLUE,
    GREEDY,
    GREEN,
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
from dsg.service import shared_pixels
from dsg.service.batching import Batcher
from dsg.service.devices import DeviceLost, OutOfMemory, Ran, WorkerDied
from dsg.service.local_device import LocalDevice, Running
from dsg.service.metrics import Metrics
from dsg.service.models import ServedModel
from dsg.service.shared_pixels import OpenSegments, SharedPixels
from dsg.service.worker import Asked, Worker
from dsg.service.worker_device import WorkerDevice

WAIT = 120
FAR = 1e12


@pytest.fixture(scope="module")
def device() -> Iterator[WorkerDevice]:
    device = WorkerDevice("cpu", load_faulty, threads=1)
    device.start()
    device.load(0, "fake")
    yield device
    device.close()


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


ROWS_COLUMNS_COLOURS = np.arange(30, dtype=np.uint8).reshape(2, 5, 3)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4),
        np.ones((3, 5, 7), "f4"),
        torch.from_numpy(ROWS_COLUMNS_COLOURS).permute(2, 0, 1),  # as a decoder has them
        ROWS_COLUMNS_COLOURS.transpose(2, 0, 1),
        torch.arange(90).reshape(3, 5, 6)[:, ::2, 1:3],
    ],
)
def test_pixels_are_shared_as_they_are(pixels: torch.Tensor | np.ndarray) -> None:
    one, there = SharedPixels(pixels), OpenSegments("cpu")
    there.add(one.segment.number, os.dup(one.segment.file))
    again = there.pixels(one.segment.number, one.layout)
    assert type(again) is type(pixels) and again.shape == pixels.shape and (again == pixels).all()
    if pixels.shape == (3, 2, 5):
        assert np.asarray(again).strides == np.asarray(pixels).strides  # not turned round


@pytest.fixture
def no_free_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # pictures of other tests would give theirs back in the middle of one that counts
    monkeypatch.setattr(shared_pixels, "_free", deque())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("no_free_segments")
def test_a_segment_serves_one_picture_after_the_other() -> None:
    first, second = SharedPixels(np.zeros((3, 9, 9), "f4")), SharedPixels(np.ones((3, 9, 9), "f4"))
    numbers = first.segment.number, second.segment.number
    assert numbers[0] != numbers[1]
    there = OpenSegments("cpu")
    for one in (first, second):
        there.add(one.segment.number, os.dup(one.segment.file))
    mapped, before = there.pixels(numbers[0], first.layout), descriptors()
    del first
    third = SharedPixels(np.full((2, 5), 7, "u1"))
    assert third.segment.number == numbers[0] and descriptors() == before
    assert (there.pixels(numbers[0], third.layout) == 7).all()
    assert (there.pixels(numbers[1], second.layout) == 1).all()
    there.forget([numbers[0]])
    del mapped
    assert descriptors() == before - 1  # the mapping's own
    with pytest.raises(KeyError):
        there.pixels(numbers[0], third.layout)


def test_a_gpu_that_does_not_register_a_segment_gets_its_pixels_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    refused = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    for device, cudart in ((lost, refused), (lambda name: contextlib.nullcontext(), lambda: refused)):
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "cudart", cudart)
        one, there = SharedPixels(np.full((3, 4, 5), 7, "u1")), OpenSegments("cuda:0")
        there.add(one.segment.number, os.dup(one.segment.file))
        assert (there.pixels(one.segment.number, one.layout) == 7).all()
        there.forget([one.segment.number])  # nothing is registered that would have to be given back


@pytest.mark.usefixtures("no_free_segments")
def test_free_segments_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    megabyte = 1 << 20
    monkeypatch.setattr(shared_pixels, "_KEPT_BYTES", 6 * megabyte)
    before = descriptors()
    pictures = [SharedPixels(np.zeros(megabyte - number, "u1")) for number in range(8)]
    large, too_large = (SharedPixels(np.zeros(size * megabyte, "u1")) for size in (3, 7))
    assert {one.segment.size for one in pictures} == {megabyte} and large.segment.size == 4 * megabyte
    assert descriptors() == before + 10
    kept = [one.segment.number for one in pictures[-2:]]
    while pictures:
        del pictures[0]
    assert descriptors() == before + 6 + 2
    del large  # those that were not used for longest make room
    assert descriptors() == before + 2 + 1 + 1
    again = [SharedPixels(np.zeros(size * megabyte, "u1")) for size in (1, 3, 1)]
    assert sorted(again[number].segment.number for number in (0, 2)) == kept
    assert descriptors() == before + 3 + 1
    del too_large
    assert descriptors() == before + 3


@pytest.mark.usefixtures("no_free_segments")
def test_a_worker_maps_a_segment_once_and_lets_go_of_it_when_it_is_gone(device: WorkerDevice) -> None:
    def mapped() -> int:
        return Path(f"/proc/{device.process_id}/maps").read_text().count("memfd:dsg-pictures")

    def lefts(*pictures: PreparedImage) -> list[float]:
        return [float(one.boxes[0, 0]) for one in device.begin(0, pictures, 0.0)().detections]

    device.restart()  # it has mapped what other tests sent it
    three = shared(device, *(prepared(left=left) for left in (5, 25, 45)))
    assert lefts(*three) == [5, 25, 45] and mapped() == 3
    assert lefts(three[2], three[0]) == [45, 5] and mapped() == 3  # as when halves of a batch run again
    del three
    again = shared(device, *(prepared(left=left) for left in (35, 15)))
    assert lefts(*again) == [35, 15] and mapped() == 3
    shared_pixels._free.clear()
    assert lefts(*again) == [35, 15] and mapped() == 2
    device.restart()
    assert lefts(*again) == [35, 15] and mapped() == 2


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
