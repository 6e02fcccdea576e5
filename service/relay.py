"""From the results of some futures to a task on a pool, with no turn of an event loop between."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")


def when_all(
    futures: Sequence[Future[_Given]], pool: Executor, task: Callable[[list[_Given]], _Result]
) -> Future[_Result]:
    """Run a task with the results of some futures as soon as all have them.

    The thread that gives the last result hands the task to the pool: an event loop that is told first waits for
    Python's lock once more, and so does whoever waits for the loop.

    Args:
        futures: at least one.
        pool: runs the task.
        task: takes their results, in their order.

    Returns:
        what the task returns or raises; or the first error of the futures, `CancelledError` for one that is cancelled.
    """
    waiting = list(futures)  # emptied at the end: each has a callback, which has all of them
    left = len(waiting)
    lock = threading.Lock()
    done: Future[_Result] = Future()

    def fail(error: BaseException) -> None:
        waiting.clear()
        with suppress(InvalidStateError):  # nobody waits any more, or another one has failed
            done.set_exception(error)

    def came(future: Future[_Given]) -> None:
        nonlocal left
        error = CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            fail(error)
            return
        with lock:
            left -= 1
            is_last = left == 0
        if is_last:
            try:
                pool.submit(run)
            except RuntimeError as shut_down:
                fail(shut_down)

    def run() -> None:
        results = [future.result() for future in waiting]
        waiting.clear()
        if done.cancelled():
            return
        try:
            result = task(results)
        except BaseException as error:
            fail(error)
            return
        with suppress(InvalidStateError):
            done.set_result(result)

    for future in futures:
        future.add_done_callback(came)
    return done
