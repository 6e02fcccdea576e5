"""How much the service holds at once: pictures, pixels and bytes that are accepted, and not answered yet."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

from dsg.service.flow import Flow
from dsg.service.metrics import Metrics
from dsg.service.problems import Problem

_LONGEST_WAIT_S = 60


class Hold:
    """What one request holds of each bound; made by `Admission.hold`. Any thread may call it."""

    def __init__(
        self, check: Callable[[str, int], None], add: Callable[[str, int], None], lock: threading.Lock
    ) -> None:
        self._check = check
        self._add = add
        self._lock = lock
        self._held: dict[str, int] = {}
        self._futures: list[Future[Any]] = []
        self._has_ended = False

    def take(self, what: str, count: int) -> None:
        """Hold so many more `pictures`, `pixels` or `bytes`.

        Raises:
            Problem: 429, they are not free; 413, one request may not have so many.
            CancelledError: the request has ended meanwhile, and nobody waits for what they are for.
        """
        with self._lock:
            if self._has_ended:
                raise CancelledError
            self._check(what, count)
            self._add(what, count)
            self._held[what] = self._held.get(what, 0) + count

    def give_back(self, what: str) -> None:
        """Hold no more of this."""
        with self._lock:
            self._add(what, -self._held.pop(what, 0))

    def cancel_at_end(self, futures: Sequence[Future[Any]]) -> None:
        """Have work given up when the request ends, where it is not done by then; at once where it has ended."""
        with self._lock:
            self._futures += futures
        if self._has_ended:
            self._cancel()

    def end(self) -> None:
        """Hold nothing, from now on."""
        with self._lock:
            self._has_ended = True
            for what, count in self._held.items():
                self._add(what, -count)
            self._held.clear()
        self._cancel()

    def _cancel(self) -> None:
        for future in self._futures:
            future.cancel()


class Admission:
    """Bounds on what is in flight.

    Args:
        pictures: most pictures.
        pixels: most pixels of pictures, as their headers say.
        max_bytes: most bytes of bodies.
        seconds_until_free: what the devices take for so many pictures, as measured.
        seconds_of_queue: what the devices take for what goes before a picture that comes now, as measured.
        metrics: told of what is held and refused.
    """

    def __init__(
        self,
        *,
        pictures: int,
        pixels: int,
        max_bytes: int,
        seconds_until_free: Callable[[int], float],
        seconds_of_queue: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self.flow = Flow()
        """Requests from when their body is there."""
        self._limits = {"pictures": pictures, "pixels": pixels, "bytes": max_bytes}
        self._held = dict.fromkeys(self._limits, 0)
        self._gauges = {
            "pictures": metrics.accepted,
            "pixels": metrics.pixels_in_flight,
            "bytes": metrics.bytes_in_flight,
        }
        self._seconds_until_free = seconds_until_free
        self._seconds_of_queue = seconds_of_queue
        self._metrics = metrics
        self._lock = threading.Lock()

    def check(self, seconds_left: float) -> None:
        """Raise the 429 problem where a request should not even send its body.

        Args:
            seconds_left: until its deadline.
        """
        with self._lock:
            self._check("pictures", 1)
        self.check_time(max(self._seconds_of_queue(), self.flow.seconds_for_one_more()), seconds_left)

    def check_time(self, takes_s: float, seconds_left: float) -> None:
        """Raise the 429 problem where something takes longer than there is time for it."""
        if takes_s > seconds_left:
            raise self._refuse("deadline", takes_s - seconds_left, "what waits already takes longer than allowed")

    @contextmanager
    def hold(self) -> Iterator["Hold"]:
        """What one request takes; all of it is free again when the block ends."""
        hold = Hold(self._check, self._add, self._lock)
        try:
            yield hold
        finally:
            hold.end()

    def _check(self, what: str, count: int) -> None:
        held, limit = self._held[what], self._limits[what]
        if held + count <= limit:
            return
        if count > limit and what == "pixels":
            detail = f"the pictures of one request have {count} pixels together, more than {limit}; send fewer at once"
            raise Problem(413, "too_many_pixels", detail)
        # Places come free at the pace of the devices. A share of the pixels or bytes is that share of the pictures.
        share = min(1.0, (held + count - limit) / held)
        wait_s = self._seconds_until_free(max(1, math.ceil(share * self._held["pictures"])))
        raise self._refuse(what, wait_s, f"{limit} {what} are in work already")

    def _add(self, what: str, count: int) -> None:
        self._held[what] += count
        self._gauges[what].set(self._held[what])

    def _refuse(self, why: str, wait_s: float, detail: str) -> Problem:
        self._metrics.rejected.labels(why).inc()
        whole_s = min(max(1, math.ceil(wait_s)), _LONGEST_WAIT_S)  # whole seconds, as the header wants them
        reason = "deadline_unreachable" if why == "deadline" else "queue_full"
        return Problem(429, reason, f"{detail}; try again in {whole_s} s", {"Retry-After": str(whole_s)})
