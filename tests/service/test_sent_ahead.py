"""What is sent to a device that is a process of its own while it still runs a batch."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pytest
from service_fakes import FakePredictor
from test_batcher import FAR, WAIT, prepared

from dsg.model.network.predictor import PreparedImage
from dsg.service.batching import Batcher, DeviceStopped
from dsg.service.devices import Ran, WorkerDied
from dsg.service.metrics import Metrics
from dsg.service.models import ServedModel
from dsg.service.pace import Foresight

MOST = 4


class Remote:
    """A device of which the test ends each batch."""

    ahead = 2
    name = "far"

    def __init__(self) -> None:
        self.begun: queue.Queue[tuple[int, Future[Ran]]] = queue.Queue()
        self.restarts = 0

    def begin(
        self, model: int, pictures: Sequence[PreparedImage], threshold: float, when_done: Callable[[], None]
    ) -> Callable[[], Ran]:
        future: Future[Ran] = Future()
        future.add_done_callback(lambda _: when_done())
        self.begun.put((len(pictures), future))
        return future.result

    def restart(self) -> None:
        self.restarts += 1

    def next(self) -> tuple[int, Callable[..., None]]:
        """How many pictures the next batch has, and what ends it, after so many seconds on the device."""
        count, future = self.begun.get(timeout=WAIT)

        def end(seconds: float = 0.0) -> None:
            now = time.monotonic()
            future.set_result(Ran([None] * count, seconds, {}, launched=now, freed=now + seconds))

        return count, end


class Rig:
    def __init__(self, seconds_a_picture: float) -> None:
        self.device, self.predictor = Remote(), FakePredictor()
        self.batcher = Batcher(
            [self.device], max_batch=MOST, max_batch_pixels=100_000, ageing_s=1e-9, metrics=Metrics()
        )
        self._model = ServedModel("far", 0, self.predictor.info, self.predictor.prepare)
        height, width = prepared(self.predictor).padded_size
        if seconds_a_picture:
            self.batcher._queue.pace.ran(1, height * width, seconds_a_picture)
        self.batcher.start()

    def submit(self, pictures: int = 1) -> list[Future]:
        return self.batcher.submit(self._model, [prepared(self.predictor)] * pictures, FAR)


@pytest.fixture
def rig(request) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.batcher.close(WAIT)


@pytest.mark.parametrize("rig", [1e-9], indirect=True)
def test_before_a_batch_ends_the_next_one_is_on_its_way(rig: Rig) -> None:
    first = rig.submit()
    _, end_first = rig.device.next()
    second = rig.submit()
    count, end_second = rig.device.next()  # though the first runs, and the second could be larger
    assert count == 1
    rest = [future for _ in range(3) for future in rig.submit()]
    end_first()
    count, end_third = rig.device.next()  # two at a time, no more: what came meanwhile goes together
    assert count == 3
    end_second()
    end_third()
    for future in (*first, *second, *rest):
        assert future.result(WAIT).detections is None


@pytest.mark.parametrize("rig", [1e6], indirect=True)
def test_while_a_batch_has_long_to_run_what_comes_collects(rig: Rig) -> None:
    rig.submit()
    _, end_first = rig.device.next()
    for _ in range(3):
        rig.submit()
    end_first()
    count, end_second = rig.device.next()
    assert count == 3
    end_second()


@pytest.mark.parametrize("rig", [1e-9], indirect=True)
def test_a_size_that_took_long_before_is_expected_to_take_long_again(rig: Rig) -> None:
    rig.submit()
    rig.device.next()[1](seconds=1e6)
    rig.submit()
    _, end_second = rig.device.next()
    rig.submit()
    with pytest.raises(queue.Empty):
        rig.device.begun.get(timeout=0.05)
    end_second()
    count, end_third = rig.device.next()
    end_third()
    assert count == 1


def test_foresight_goes_by_the_middle_of_the_last_five_and_by_what_sending_took() -> None:
    foresight = Foresight()
    assert foresight.seconds(100) is None
    for seconds in (9.0, 1.0, 2.0):
        foresight.ran(100, seconds, travel_s=0.02)
    assert foresight.seconds(100) == 2 and foresight.seconds(200) is None
    for seconds in (2.5, 2.6, 2.7):
        foresight.ran(100, seconds, travel_s=0.02)
    assert foresight.seconds(100) == 2.5  # of 1, 2, 2.5, 2.6, 2.7
    assert 0.015 < foresight.travel_s < 0.021
    for pixels in range(1000, 2000):
        foresight.ran(pixels, 1.0, travel_s=0.02)
    assert foresight.seconds(100) is None and foresight.seconds(1999) == 1
    assert foresight.travel_s == pytest.approx(0.021)


@pytest.mark.parametrize("rig", [1e6], indirect=True)
def test_a_full_batch_waits_for_nothing(rig: Rig) -> None:
    rig.submit()
    _, end_first = rig.device.next()
    rig.submit(MOST)
    count, end_second = rig.device.next()
    assert count == MOST
    end_first()
    end_second()


@pytest.mark.parametrize("rig", [1e6], indirect=True)
def test_closing_does_not_wait_for_the_next(rig: Rig) -> None:
    (runs,) = rig.submit()
    _, end_first = rig.device.next()
    (waits,) = rig.submit()
    rig.batcher.close(0)
    end_first()
    assert runs.result(WAIT).detections is None
    with pytest.raises(DeviceStopped):
        waits.result(WAIT)


@pytest.mark.parametrize("rig", [1e-9], indirect=True)
def test_after_a_death_each_picture_that_was_there_runs_with_nothing_beside_it(rig: Rig) -> None:
    # A batch may begin on a GPU before the one ahead of it is answered: either may be what ended the process.
    (first,) = rig.submit()
    lost = [rig.device.begun.get(timeout=WAIT)]
    (second,) = rig.submit()
    lost.append(rig.device.begun.get(timeout=WAIT))
    (third,) = rig.submit()
    for _, future in lost:
        future.set_exception(WorkerDied("the worker ended"))
    for number in range(2):  # and before all else, however much of that there is
        count, end = rig.device.next()
        rig.submit(MOST)
        with pytest.raises(queue.Empty):
            rig.device.begun.get(timeout=0.05)
        assert count == 1 and [first.done(), second.done()].count(True) == number and not third.done()
        end()
    while not third.done():
        rig.device.next()[1]()
    for future in (first, second, third):
        assert future.result(WAIT).detections is None
    assert rig.device.restarts == 1


@pytest.mark.parametrize("rig", [1e-9], indirect=True)
def test_a_picture_that_was_there_at_two_deaths_fails_and_no_other(rig: Rig) -> None:
    (first,) = rig.submit()
    _, ran = rig.device.begun.get(timeout=WAIT)
    (second,) = rig.submit()
    _, waits = rig.device.begun.get(timeout=WAIT)
    for future in (ran, waits):
        future.set_exception(WorkerDied("the worker ended"))
    _, again = rig.device.begun.get(timeout=WAIT)
    again.set_exception(WorkerDied("the worker ended"))
    _, end = rig.device.next()
    end()
    failed, answered = sorted((first, second), key=lambda future: future.exception(WAIT) is None)
    assert isinstance(failed.exception(WAIT), WorkerDied) and answered.result(WAIT).detections is None
