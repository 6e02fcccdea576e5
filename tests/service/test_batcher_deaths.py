"""A device whose process dies: it is started again, what it had runs again, and no picture is blamed for another."""

import threading
from concurrent.futures import Future

import pytest
from service_fakes import FakePredictor
from test_batcher import FAR, WAIT, prepared

from dsg.service.batching import Batcher, DeviceLost, DeviceStopped, WorkerDied
from dsg.service.local_device import LocalDevice
from dsg.service.metrics import Metrics
from dsg.service.models import ServedModel


class Mortal(LocalDevice):
    """Stands for a worker that dies over its first batches, and then as often as the test says while it starts."""

    def __init__(self, predictor: FakePredictor, batches: int, starts: list[Exception | None]) -> None:
        super().__init__("mortal", lambda source, _: predictor)
        self._batches, self._starts = batches, starts

    def begin(self, *given):
        self._batches -= 1
        return super().begin(*given) if self._batches < 0 else self._die

    def _die(self):
        raise WorkerDied("the worker ended")

    def restart(self) -> None:
        error = self._starts.pop(0)
        if error is not None:
            raise error


def mortal(metrics: Metrics, predictor: FakePredictor, *given) -> tuple[Mortal, Batcher, Future]:
    """The device, its batcher, and a picture on it."""
    device = Mortal(predictor, *given)
    device.load(0, "fake")
    batcher = Batcher([device], max_batch=4, max_batch_pixels=100_000, ageing_s=1e-9, metrics=metrics)
    model = ServedModel("fake", 0, predictor.info, predictor.prepare)
    (future,) = batcher.submit(model, [prepared(predictor)], FAR)
    batcher.start()
    return device, batcher, future


def deaths(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("dsg_worker_deaths_total", {"device": "mortal"})


def test_a_worker_that_dies_while_it_starts_is_started_again_and_no_picture_is_blamed(
    metrics: Metrics, predictor: FakePredictor
) -> None:
    died = WorkerDied("the worker ended")
    _, batcher, future = mortal(metrics, predictor, 1, [died, died, None])
    assert future.result(WAIT).batch_size == 1
    assert (deaths(metrics), batcher.fault, batcher.is_up) == (3, None, True)
    batcher.close(WAIT)


def test_a_worker_that_dies_four_times_in_a_row_is_given_up(metrics: Metrics, predictor: FakePredictor) -> None:
    died = WorkerDied("the worker ended")
    _, batcher, future = mortal(metrics, predictor, 1, [died, died, died, None])
    with pytest.raises(DeviceLost, match="again and again"):
        future.result(WAIT)
    assert deaths(metrics) == 4 and batcher.fault is not None and not batcher.is_up
    batcher.close(WAIT)


def test_a_model_that_does_not_load_again_is_not_tried_twice(metrics: Metrics, predictor: FakePredictor) -> None:
    _, batcher, future = mortal(metrics, predictor, 1, [ValueError("the file of a model has changed"), None])
    with pytest.raises(DeviceLost, match="does not start again"):
        future.result(WAIT)
    assert deaths(metrics) == 1
    batcher.close(WAIT)


def test_a_worker_that_dies_with_nothing_to_run_is_started_again_at_once(
    metrics: Metrics, predictor: FakePredictor
) -> None:
    starting, go_on = threading.Event(), threading.Event()
    device, batcher, future = mortal(metrics, predictor, 0, [])
    assert future.result(WAIT).batch_size == 1
    device.restart = lambda: starting.set() or go_on.wait(WAIT)
    device.when_died(WorkerDied("the worker ended"))
    assert starting.wait(WAIT) and not batcher.is_up
    assert metrics.registry.get_sample_value("dsg_device_up", {"device": "mortal"}) == 0
    model = ServedModel("fake", 0, predictor.info, predictor.prepare)
    (waits,) = batcher.submit(model, [prepared(predictor)], FAR)
    go_on.set()
    assert waits.result(WAIT).batch_size == 1
    assert (deaths(metrics), batcher.fault, batcher.is_up) == (1, None, True)
    batcher.close(WAIT)


def test_what_a_worker_dies_with_while_the_batcher_is_closed_is_answered(
    metrics: Metrics, predictor: FakePredictor
) -> None:
    dying, go_on = threading.Event(), threading.Event()
    device = Mortal(predictor, 1, [])
    device._die = lambda: dying.set() or (go_on.wait(WAIT) and Mortal._die(device))
    batcher = Batcher([device], max_batch=4, max_batch_pixels=100_000, ageing_s=1e-9, metrics=metrics)
    batcher.start()
    model = ServedModel("fake", 0, predictor.info, predictor.prepare)
    (future,) = batcher.submit(model, [prepared(predictor)], FAR)
    assert dying.wait(WAIT)
    batcher.close(0)
    go_on.set()
    with pytest.raises(DeviceStopped):
        future.result(WAIT)
