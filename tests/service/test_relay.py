"""From futures to a task on a pool."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsg.service.relay import when_all

WAIT = 30


@given(order=st.permutations(range(4)))
def test_a_task_runs_once_with_all_results_in_order_whichever_comes_last(order: list[int]) -> None:
    futures: list[Future[int]] = [Future() for _ in order]
    ran: list[list[int]] = []
    with ThreadPoolExecutor(1, "encoder") as pool:

        def task(results: list[int]) -> str:
            ran.append(results)
            return threading.current_thread().name

        done = when_all(futures, pool, task)
        for number in order:
            assert not ran
            futures[number].set_result(10 * number)
        assert done.result(WAIT).startswith("encoder")
    assert ran == [[0, 10, 20, 30]]


def test_results_that_are_there_already_are_enough() -> None:
    future: Future[int] = Future()
    future.set_result(3)
    with ThreadPoolExecutor(1) as pool:
        assert when_all([future], pool, sum).result(WAIT) == 3


def test_the_first_error_is_the_error_and_the_task_does_not_run() -> None:
    ran: list[list[int]] = []
    first, second, third = (Future[int]() for _ in range(3))
    with ThreadPoolExecutor(1) as pool:
        done = when_all([first, second, third], pool, ran.append)
        first.set_result(1)
        third.set_exception(ValueError("third"))
        second.set_exception(KeyError("second"))
        with pytest.raises(ValueError, match="third"):
            done.result(WAIT)
    assert not ran


def test_what_is_cancelled_and_what_fails_in_the_task_are_errors_too() -> None:
    future: Future[int] = Future()
    with ThreadPoolExecutor(1) as pool:
        done = when_all([future], pool, sum)
        future.cancel()
        with pytest.raises(CancelledError):
            done.result(WAIT)
        ready: Future[int] = Future()
        ready.set_result(0)
        with pytest.raises(ZeroDivisionError):
            when_all([ready], pool, lambda results: 1 // results[0]).result(WAIT)
    late: Future[int] = Future()
    done = when_all([late], pool, sum)  # whose pool is shut down
    late.set_result(1)
    with pytest.raises(RuntimeError):
        done.result(WAIT)


def test_what_nobody_waits_for_any_more_is_not_run() -> None:
    gate, ran = threading.Event(), []
    futures = [Future[int]() for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(gate.wait, WAIT)
        done = when_all(futures, pool, ran.append)
        for future in futures:
            future.set_result(1)
        assert done.cancel()  # it waits for the pool's only thread
        gate.set()
        assert busy.result(WAIT)
        pool.submit(int).result(WAIT)
    assert done.cancelled() and not ran


def test_results_are_let_go_without_a_search_for_rings() -> None:
    class Large:
        pass

    gc.collect()
    gc.disable()
    try:
        for fails in (False, True):
            large, future, other = Large(), Future[Large](), Future[Large]()
            gone = weakref.ref(large)
            with ThreadPoolExecutor(1) as pool:
                done = when_all([future, other], pool, len)
                future.set_result(large)
                if fails:
                    other.set_exception(ValueError())
                    assert done.exception(WAIT) is not None
                else:
                    other.set_result(large)
                    assert done.result(WAIT) == 2
            del large, future, other, done
            assert gone() is None
    finally:
        gc.enable()
