"""The queue and its device thread, without HTTP."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from service_fakes import POISON, FakePredictor

from dsg.model.network.predictor import PreparedImage
from dsg.service.batching import Batcher, DeadlinePassed, DeviceStopped
from dsg.service.metrics import Metrics

FAR = 1e12
WAIT = 60


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def predictor() -> FakePredictor:
    return FakePredictor()


@pytest.fixture
def batcher(metrics: Metrics, predictor: FakePredictor) -> Iterator[Batcher]:
    batcher = Batcher(max_batch=4, metrics=metrics)
    batcher.start()
    yield batcher
    predictor.gate.set()
    batcher.close(WAIT)


def prepared(predictor: FakePredictor, height: int = 8, width: int = 8, bad: bool = False) -> PreparedImage:
    pixels = np.full((height, width, 3), 128, np.uint8)
    if bad:
        pixels[0] = POISON
    return predictor.prepare(pixels)


def occupy(batcher: Batcher, predictor: FakePredictor) -> Future:
    """Keep the device busy until `predictor.gate` opens."""
    predictor.gate.clear()
    (future,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    predictor.wait_entered()
    return future


def test_an_idle_device_starts_at_once_and_alone(batcher: Batcher, predictor: FakePredictor) -> None:
    for _ in range(3):
        (future,) = batcher.submit(predictor, [prepared(predictor)], FAR)
        assert future.result(WAIT).batch_size == 1
    assert predictor.threads == {"dsg-device"}
    assert batcher.seconds_per_picture() > 0


def test_pictures_of_one_request_run_together(batcher: Batcher, predictor: FakePredictor) -> None:
    futures = batcher.submit(predictor, [prepared(predictor)] * 3, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [3, 3, 3]


def test_a_busy_device_collects_up_to_the_largest_batch(
    batcher: Batcher, predictor: FakePredictor, metrics: Metrics
) -> None:
    first = occupy(batcher, predictor)
    futures = [batcher.submit(predictor, [prepared(predictor)], FAR)[0] for _ in range(6)]
    assert metrics.registry.get_sample_value("dsg_queued_pictures") == 6
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in [first, *futures]] == [1, 4, 4, 4, 4, 2, 2]
    assert metrics.registry.get_sample_value("dsg_queued_pictures") == 0
    assert metrics.registry.get_sample_value("dsg_batch_size_sum") == 7
    assert metrics.registry.get_sample_value("dsg_batch_size_count") == 3


def test_the_bucket_whose_first_has_waited_longest_goes_first(batcher: Batcher, predictor: FakePredictor) -> None:
    occupy(batcher, predictor)
    order = [8, 40, 8, 8, 8, 8, 72, 8]
    futures = [batcher.submit(predictor, [prepared(predictor, height)], FAR)[0] for height in order]
    predictor.gate.set()
    for future in futures:
        future.result(WAIT)
    heights = [[height for height, _ in batch] for batch in predictor.batches[1:]]
    assert heights == [[8] * 4, [40], [8, 8], [72]]


def test_models_never_share_a_batch(batcher: Batcher, predictor: FakePredictor) -> None:
    other = FakePredictor()
    occupy(batcher, predictor)
    futures = [batcher.submit(one, [prepared(one)], FAR)[0] for one in (predictor, other, predictor, other)]
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in futures] == [2, 2, 2, 2]
    assert len(other.batches) == 1


def test_a_batch_runs_with_the_lowest_score_threshold_in_it(batcher: Batcher, predictor: FakePredictor) -> None:
    occupy(batcher, predictor)
    futures = [batcher.submit(predictor, [prepared(predictor)], FAR, one)[0] for one in (0.5, 0.2, 0.9)]
    predictor.gate.set()
    assert [future.result(WAIT).batch_size for future in futures] == [3, 3, 3]
    assert predictor.thresholds == [0.0, 0.2]


@pytest.mark.parametrize("culprits", [{0}, {3}, {1, 2}, {0, 1, 2, 3}])
def test_only_the_culprits_of_a_batch_fail(
    batcher: Batcher, predictor: FakePredictor, metrics: Metrics, culprits: set[int]
) -> None:
    pictures = [prepared(predictor, bad=number in culprits) for number in range(4)]
    futures = batcher.submit(predictor, pictures, FAR)
    for number, future in enumerate(futures):
        if number in culprits:
            with pytest.raises(RuntimeError, match="cannot stand"):
                future.result(WAIT)
        else:
            assert len(future.result(WAIT).detections) == 0
    assert metrics.registry.get_sample_value("dsg_batch_splits_total") >= 1


def test_a_batch_too_large_for_the_memory_runs_in_parts(batcher: Batcher, predictor: FakePredictor) -> None:
    predictor.failure = lambda batch: MemoryError("CUDA out of memory") if len(batch) > 1 else None
    futures = batcher.submit(predictor, [prepared(predictor)] * 4, FAR)
    assert [future.result(WAIT).batch_size for future in futures] == [1, 1, 1, 1]
    assert batcher.fault is None


def test_a_lost_device_is_not_tried_again(batcher: Batcher, predictor: FakePredictor) -> None:
    predictor.failure = lambda batch: RuntimeError("CUDA error: device-side assert triggered")
    futures = batcher.submit(predictor, [prepared(predictor)] * 4, FAR)
    for future in futures:
        with pytest.raises(RuntimeError, match="CUDA error"):
            future.result(WAIT)
    assert len(predictor.batches) == 1
    assert batcher.fault is not None


def test_too_few_answers_are_an_error(batcher: Batcher, predictor: FakePredictor, monkeypatch) -> None:
    monkeypatch.setattr(predictor, "detect", lambda batch, score_threshold: [])
    (future,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    with pytest.raises(RuntimeError, match="0 answers for 1"):
        future.result(WAIT)


def test_what_is_late_is_dropped_before_it_runs(batcher: Batcher, predictor: FakePredictor, metrics: Metrics) -> None:
    occupy(batcher, predictor)
    (late,) = batcher.submit(predictor, [prepared(predictor)], time.monotonic())
    (good,) = batcher.submit(predictor, [prepared(predictor)], FAR)
    predictor.gate.set()
    with pytest.raises(DeadlinePassed):
        late.result(WAIT)
    assert good.result(WAIT).batch_size == 1
    assert len(predictor.batches) == 2
    assert metrics.registry.get_sample_value("dsg_dropped_pictures_total", {"cause": "deadline"}) == 1


def test_what_is_cancelled_leaves_the_queue_at_once(
    batcher: Batcher, predictor: FakePredictor, metrics: Metrics
) -> None:
    occupy(batcher, predictor)
    futures = batcher.submit(predictor, [prepared(predictor)] * 3, FAR)
    assert futures[1].cancel()
    assert metrics.registry.get_sample_value("dsg_queued_pictures") == 2
    assert metrics.registry.get_sample_value("dsg_dropped_pictures_total", {"cause": "cancelled"}) == 1
    predictor.gate.set()
    assert futures[0].result(WAIT).batch_size == futures[2].result(WAIT).batch_size == 2


def test_what_runs_can_no_longer_be_cancelled(batcher: Batcher, predictor: FakePredictor) -> None:
    running = occupy(batcher, predictor)
    assert not running.cancel()
    predictor.gate.set()
    assert running.result(WAIT).batch_size == 1


def test_closing_fails_what_waits_and_finishes_what_runs(batcher: Batcher, predictor: FakePredictor) -> None:
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


def test_many_threads_lose_and_cross_nothing(batcher: Batcher, predictor: FakePredictor) -> None:
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
