"""How many pictures the service holds at once: accepted, and not answered yet."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsg.service.metrics import Metrics
from dsg.service.problems import Problem

_LONGEST_WAIT_S = 60


class Admission:
    """Places for pictures. All calls come from the event loop, so that counting needs no lock.

    Args:
        limit: places.
        seconds_per_picture: what the device takes for one picture now, as the batcher measures it.
        metrics: told of the places taken.
    """

    def __init__(self, limit: int, seconds_per_picture: Callable[[], float], metrics: Metrics) -> None:
        self._limit = limit
        self._seconds_per_picture = seconds_per_picture
        self._metrics = metrics
        self._taken = 0

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold `count` places for as long as the block runs. Raises what `check` raises."""
        self.check(count)
        self._taken += count
        self._metrics.accepted.set(self._taken)
        try:
            yield
        finally:
            self._taken -= count
            self._metrics.accepted.set(self._taken)

    def check(self, count: int = 1) -> None:
        """Raise the 429 problem, with a `Retry-After`, if `count` places are not free."""
        over = self._taken + count - self._limit
        if over <= 0:
            return
        # Places come free at the pace of the device; whole seconds, as the header wants them.
        wait_s = min(max(1, math.ceil(over * self._seconds_per_picture())), _LONGEST_WAIT_S)
        detail = f"{self._limit} pictures are waiting already; try again in {wait_s} s"
        raise Problem(429, "queue_full", detail, {"Retry-After": str(wait_s)})
