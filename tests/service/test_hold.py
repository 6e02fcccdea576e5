"""What a request holds, whichever thread takes it and however it ends."""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from dsg.service.admission import Admission
from dsg.service.metrics import Metrics
from dsg.service.problems import Problem


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def admission(metrics: Metrics) -> Admission:
    return Admission(
        pictures=8,
        pixels=1000,
        max_bytes=500,
        seconds_until_free=lambda pictures: 2.5,
        seconds_of_queue=lambda: 0.0,
        metrics=metrics,
    )


def held(metrics: Metrics) -> list[float]:
    return [one._value.get() for one in (metrics.accepted, metrics.pixels_in_flight, metrics.bytes_in_flight)]


def test_what_is_held_is_counted_and_given_back_once(admission: Admission, metrics: Metrics) -> None:
    with admission.hold() as one, admission.hold() as other:
        one.take("bytes", 100)
        one.take("bytes", 50)
        other.take("pictures", 2)
        other.take("pixels", 900)
        assert held(metrics) == [2, 900, 150]
        one.give_back("bytes")
        one.give_back("bytes")
        assert held(metrics) == [2, 900, 0]
        with pytest.raises(Problem) as refused:
            one.take("pixels", 101)
        assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "3"
        with pytest.raises(Problem) as refused:
            one.take("pixels", 1001)
        assert refused.value.status == 413
        assert held(metrics) == [2, 900, 0]
    assert held(metrics) == [0, 0, 0]


def test_a_thread_that_comes_after_the_end_takes_nothing(admission: Admission, metrics: Metrics) -> None:
    with admission.hold() as hold:
        hold.take("pictures", 1)
    with pytest.raises(CancelledError):
        hold.take("pixels", 10)
    assert held(metrics) == [0, 0, 0]


def test_what_is_not_done_at_the_end_is_cancelled_and_so_is_what_comes_later(admission: Admission) -> None:
    done, running, early, late = (Future[int]() for _ in range(4))
    done.set_result(1)
    running.set_running_or_notify_cancel()
    with admission.hold() as hold:
        hold.cancel_at_end([done, running])
        hold.cancel_at_end([early])
        assert not early.cancelled()
    hold.cancel_at_end([late])
    assert early.cancelled() and late.cancelled()
    assert done.result() == 1 and not running.cancelled()


def test_threads_never_hold_more_than_there_is(admission: Admission, metrics: Metrics) -> None:
    at_once, most, lock = threading.Barrier(16), [0.0], threading.Lock()

    def one(number: int) -> bool:
        at_once.wait(30)
        try:
            with admission.hold() as hold:
                hold.take("pictures", 1)
                with lock:
                    most[0] = max(most[0], held(metrics)[0])
                at_once_more.wait(30)
                return True
        except Problem:
            at_once_more.wait(30)
            return False

    at_once_more = threading.Barrier(16)
    with ThreadPoolExecutor(16) as pool:
        took = list(pool.map(one, range(16)))
    assert sum(took) == 8 and most[0] == 8 and held(metrics) == [0, 0, 0]
