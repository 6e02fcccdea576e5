"""The queue and its device thread, without HTTP."""

import gc
import math
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from service_fakes import POISON, FakePredictor

from dsg.model.network.predictor import PreparedImage
from dsg.service.batching import Batcher, DeadlinePassed, DeviceLost, DeviceStopped, OutOfMemory
from dsg.service.local_device import LocalDevice
from dsg.service.metrics import Metrics
from dsg.service.models import ServedModel

FAR = 1e12
WAIT = 60


class Rig:
    """A batcher of one device of this process, or of several, and predictors as models on it."""

    def __init__(self, metrics: Metrics, devices: int = 1, ageing_s: float = 1e-9) -> None:
        self._predictors: dict[str, FakePredictor] = {}
        self._models: dict[FakePredictor, ServedModel] = {}
        self.devices = [
            LocalDevice(f"cpu {number}", lambda source, _: self._predictors[source]) for number in range(devices)
        ]
        self.batcher = Batcher(self.devices, max_batch=4, max_batch_pixels=100_000, ageing_s=ageing_s, metrics=metrics)
        self.batcher.start()
        self.close = self.batcher.close

    @property
    def fault(self) -> str | None:
        return self.batcher.fault

    def model(self, predictor: FakePredictor) -> ServedModel:
        if predictor not in self._models:
            number = len(self._models)
            self._predictors[str(number)] = predictor
            for device in self.devices:
                device.load(number, str(number))
            self._models[predictor] = ServedModel(str(number), number, predictor.info, predictor.prepare)
        return self._models[predictor]

    def submit(self, predictor: FakePredictor, *given) -> list[Future]:
        return self.batcher.submit(self.model(predictor), *given)


@pytest.fixture
def batcher(metrics: Metrics, predictor: FakePredictor) -> Iterator[Rig]:
    rig = Rig(metrics)
    yield rig
    predictor.gate.set()
    rig.close(WAIT)


def prepared(predictor: FakePredictor, height: int = 8, width: int = 8, bad: bool = False) -> PreparedImage:
    pixels = np.full((height, width, 3), 128, np.uint8)
    if bad:
        pixels[0] = POISON
    return predictor.prepare(pixels)


def occupy(batcher: Rig, predictor: FakePredictor) -> Future:
    """Keep the device busy until `predictor.gate` opens."""
    predictor.gate.clear()
    (future,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    predictor.wait_entered()
    return future


def test_a_request_with_many_pictures_does_not_keep_others_waiting_for_all_of_them(
    batcher: Rig, predictor: FakePredictor
) -> None:
    inner, many = batcher.batcher, [prepared(predictor) for _ in range(8)]
    seconds = 10.0  # for each
    inner._queue.pace.ran(1, math.prod(many[0].padded_size), seconds)
    first = occupy(batcher, predictor)
    assert inner.seconds_of_request(many) == 0.0  # nothing else waits
    heavy = batcher.submit(predictor, many, FAR)
    assert inner.seconds_of_queue() == pytest.approx(seconds)  # the turn of one has come
    assert inner.seconds_of_request(many[:1]) == 0.0
    assert inner.seconds_of_request(many) == pytest.approx(8 * 2 * seconds)  # two requests, in turn
    light = [batcher.submit(predictor, [prepared(predictor, height=7)], FAR)[0] for _ in range(2)]
    assert inner.seconds_of_queue() == pytest.approx(3 * seconds)
    predictor.gate.set()
    for future in (first, *heavy, *light):
        future.result(WAIT)
    assert predictor.batches[1:] == [[(8, 8), (7, 8), (7, 8), (8, 8)], [(8, 8)] * 4, [(8, 8)] * 2]


def test_an_idle_device_starts_at_once_and_alone(batcher: Rig, predictor: FakePredictor) -> None:
    for _ in range(3):
        (future,) = batcher.submit(predictor, [prepared(predictor)], FAR)
        assert future.result(WAIT).batch_size == 1
    assert predictor.threads == {"dsg-device cpu 0"}
    assert batcher.batcher.seconds_until_free(1) > 0


def test_pictures_of_one_request_run_together(batcher: Rig, predictor: FakePredictor) -> None:
    futures = batcher.submit(predictor, [prepared(predictor)] * 3, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [3, 3, 3]


def test_a_busy_device_collects_up_to_the_largest_batch(
    batcher: Rig, predictor: FakePredictor, metrics: Metrics
) -> None:
    first = occupy(batcher, predictor)
    futures = [batcher.submit(predictor, [prepared(predictor)], FAR)[0] for _ in range(6)]
    assert metrics.registry.get_sample_value("dsg_queued_pictures") == 6
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in [first, *futures]] == [1, 4, 4, 4, 4, 2, 2]
    assert metrics.registry.get_sample_value("dsg_queued_pictures") == 0
    assert metrics.registry.get_sample_value("dsg_batch_size_sum") == 7
    assert metrics.registry.get_sample_value("dsg_batch_size_count") == 3


def test_the_bucket_whose_first_has_waited_longest_goes_first(batcher: Rig, predictor: FakePredictor) -> None:
    occupy(batcher, predictor)
    order = [8, 40, 8, 8, 8, 8, 72, 8]
    futures = [batcher.submit(predictor, [prepared(predictor, height)], FAR)[0] for height in order]
    predictor.gate.set()
    for future in futures:
        future.result(WAIT)
    heights = [[height for height, _ in batch] for batch in predictor.batches[1:]]
    assert heights == [[8] * 4, [40], [8, 8], [72]]


def test_models_never_share_a_batch(batcher: Rig, predictor: FakePredictor) -> None:
    other = FakePredictor()
    occupy(batcher, predictor)
    futures = [batcher.submit(one, [prepared(one)], FAR)[0] for one in (predictor, other, predictor, other)]
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in futures] == [2, 2, 2, 2]
    assert len(other.batches) == 1


def test_a_batch_runs_with_the_lowest_score_threshold_in_it(batcher: Rig, predictor: FakePredictor) -> None:
    occupy(batcher, predictor)
    futures = [batcher.submit(predictor, [prepared(predictor)], FAR, one)[0] for one in (0.5, 0.2, 0.9)]
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in futures] == [3, 3, 3]
    assert predictor.thresholds == [0.0, 0.2]


@pytest.mark.parametrize("culprits", [{0}, {3}, {1, 2}, {0, 1, 2, 3}])
def test_only_the_culprits_of_a_batch_fail(
    batcher: Rig, predictor: FakePredictor, metrics: Metrics, culprits: set[int]
) -> None:
    pictures = [prepared(predictor, bad=number in culprits) for number in range(4)]
    futures = batcher.submit(predictor, pictures, FAR)
    for number, future in enumerate(futures):
        if number in culprits:
            with pytest.raises(RuntimeError, match="cannot stand"):
                future.result(WAIT)
        else:
            assert len(future.result(WAIT).detections) == 0
    assert metrics.registry.get_sample_value("dsg_batch_splits_total", {"cause": "error"}) >= 1


def test_an_answered_picture_is_let_go_at_once(batcher: Rig, predictor: FakePredictor) -> None:
    # By the last to hold it: not once Python looks for rings, for which it stops all threads and frees many at a time.
    picture = prepared(predictor)
    gone = weakref.ref(picture)
    gc.disable()
    try:
        batcher.submit(predictor, [picture], FAR)[0].result(WAIT)
        del picture
        for _ in range(2):  # by then the device's thread is done with the first
            batcher.submit(predictor, [prepared(predictor)], FAR)[0].result(WAIT)
        assert gone() is None
    finally:
        gc.enable()


def test_a_batch_too_large_for_the_memory_runs_in_parts(batcher: Rig, predictor: FakePredictor) -> None:
    predictor.failure = lambda batch: MemoryError("CUDA out of memory") if len(batch) > 1 else None
    futures = batcher.submit(predictor, [prepared(predictor)] * 4, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [1, 1, 1, 1]
    assert batcher.fault is None


def test_out_of_memory_lowers_the_limit_and_success_raises_it_again(
    batcher: Rig, predictor: FakePredictor, metrics: Metrics
) -> None:
    def limit() -> float:
        return metrics.registry.get_sample_value("dsg_batch_limit_pixels", {"device": "cpu 0"})

    most = 2
    predictor.failure = lambda batch: RuntimeError("CUDA out of memory") if len(batch) > most else None
    picture = prepared(predictor)  # 32 x 32 padded
    futures = batcher.submit(predictor, [picture] * 4, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [2, 2, 2, 2]
    assert metrics.registry.get_sample_value("dsg_batch_splits_total", {"cause": "out_of_memory"}) == 1
    assert limit() == 2 * 32 * 32
    futures = batcher.submit(predictor, [picture] * 4, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [2, 2, 2, 2]  # none is tried that is too large
    assert metrics.registry.get_sample_value("dsg_batch_splits_total", {"cause": "out_of_memory"}) == 1
    most = 4  # another process has given its memory back
    for _ in range(2000):
        batcher.submit(predictor, [picture], FAR)[0].result(WAIT)
        if limit() == 100_000:
            break
    assert limit() == 100_000
    futures = batcher.submit(predictor, [picture] * 4, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [4, 4, 4, 4]


def test_one_picture_without_memory_is_tried_twice(batcher: Rig, predictor: FakePredictor) -> None:
    failures = [MemoryError(), None, MemoryError(), MemoryError()]
    predictor.failure = lambda batch: failures.pop(0)
    assert batcher.submit(predictor, [prepared(predictor)], FAR)[0].result(WAIT).batch_size == 1
    with pytest.raises(OutOfMemory):
        batcher.submit(predictor, [prepared(predictor)], FAR)[0].result(WAIT)


def test_a_large_picture_runs_alone(batcher: Rig, predictor: FakePredictor) -> None:
    occupy(batcher, predictor)
    futures = batcher.submit(predictor, [prepared(predictor, 200, 300)] * 2, FAR)  # 224 x 320 each: two are too many
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in futures] == [1, 1]


def test_a_lost_device_is_not_tried_again(batcher: Rig, predictor: FakePredictor) -> None:
    occupy(batcher, predictor)
    futures = batcher.submit(predictor, [prepared(predictor)] * 4, FAR)
    other_shape = batcher.submit(predictor, [prepared(predictor, 40)], FAR)
    predictor.failure = lambda batch: RuntimeError("CUDA error: device-side assert triggered")
    predictor.gate.set()
    for future in [*futures, *other_shape]:
        with pytest.raises(DeviceLost):
            future.result(WAIT)
    assert len(predictor.batches) == 1
    assert batcher.fault is not None
    with pytest.raises(DeviceLost):
        batcher.submit(predictor, [prepared(predictor)], FAR)


def test_several_devices_share_one_queue(metrics: Metrics) -> None:
    predictor = FakePredictor()
    rig = Rig(metrics, devices=2)
    predictor.gate.clear()
    futures = [rig.submit(predictor, [prepared(predictor)], FAR)[0]]
    predictor.wait_entered()
    futures.append(rig.submit(predictor, [prepared(predictor)], FAR)[0])
    predictor.wait_entered()  # the other device did not wait for the first
    futures += rig.submit(predictor, [prepared(predictor)] * 3, FAR)
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in futures] == [1, 1, 3, 3, 3]
    assert predictor.threads == {"dsg-device cpu 0", "dsg-device cpu 1"}
    rig.close(WAIT)


def test_when_one_of_two_devices_is_lost_the_other_goes_on(metrics: Metrics) -> None:
    predictor = FakePredictor()
    rig = Rig(metrics, devices=2)
    failures = [RuntimeError("CUDA error: unspecified launch failure"), None]
    predictor.failure = lambda batch: failures.pop(0)
    with pytest.raises(DeviceLost):
        rig.submit(predictor, [prepared(predictor)], FAR)[0].result(WAIT)
    assert rig.submit(predictor, [prepared(predictor)], FAR)[0].result(WAIT).batch_size == 1
    assert rig.fault is not None  # and yet: this process must be restarted
    rig.close(WAIT)


def test_too_few_answers_are_an_error(batcher: Rig, predictor: FakePredictor, monkeypatch) -> None:
    monkeypatch.setattr(predictor, "detect", lambda batch, score_threshold: [])
    (future,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    with pytest.raises(RuntimeError, match="0 answers for 1"):
        future.result(WAIT)


def test_what_is_late_is_dropped_before_it_runs(batcher: Rig, predictor: FakePredictor, metrics: Metrics) -> None:
    occupy(batcher, predictor)
    (late,) = batcher.submit(predictor, [prepared(predictor)], time.monotonic())
    (good,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    predictor.gate.set()
    with pytest.raises(DeadlinePassed):
        late.result(WAIT)
    assert good.result(WAIT).batch_size == 1
    assert len(predictor.batches) == 2
    assert metrics.registry.get_sample_value("dsg_dropped_pictures_total", {"cause": "deadline"}) == 1


def test_what_is_cancelled_leaves_the_queue_at_once(batcher: Rig, predictor: FakePredictor, metrics: Metrics) -> None:
    occupy(batcher, predictor)
    futures = batcher.submit(predictor, [prepared(predictor)] * 3, FAR)
    assert futures[1].cancel()
    assert metrics.registry.get_sample_value("dsg_queued_pictures") == 2
    assert metrics.registry.get_sample_value("dsg_dropped_pictures_total", {"cause": "cancelled"}) == 1
    predictor.gate.set()
    assert futures[0].result(WAIT).batch_size == futures[2].result(WAIT).batch_size == 2


def test_what_runs_can_no_longer_be_cancelled(batcher: Rig, predictor: FakePredictor) -> None:
    running = occupy(batcher, predictor)
    assert not running.cancel()
    predictor.gate.set()
    assert running.result(WAIT).batch_size == 1


def test_closing_fails_what_waits_and_finishes_what_runs(batcher: Rig, predictor: FakePredictor) -> None:
    running = occupy(batcher, predictor)
    (waiting,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    closing = threading.Thread(target=batcher.close, args=(WAIT,))
    closing.start()
    with pytest.raises(DeviceStopped):
        waiting.result(WAIT)
    predictor.gate.set()
    closing.join(WAIT)
    assert running.result(WAIT).batch_size == 1
    with pytest.raises(DeviceStopped):
        batcher.submit(predictor, [prepared(predictor)], FAR)
    assert batcher.fault is None


def test_many_threads_lose_and_cross_nothing(batcher: Rig, predictor: FakePredictor) -> None:
    def ask(number: int) -> None:
        for turn in range(20):
            width = 8 + (number * 20 + turn) % 90
            (future,) = batcher.submit(predictor, [prepared(predictor, 8, width)], FAR)
            sizes.append((width, future.result(WAIT).detections.image_size))

    sizes: list[tuple[int, tuple[int, int]]] = []
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(sizes) == 160
    assert all(size == (8, width) for width, size in sizes)
