"""How long a request stays, by how many others are in work."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The past counts for about so many requests, but not for longer than so many seconds in which something was in work:
# a slow service is to be known before many have left.
_MEMORY, _MEMORY_S = 32, 4.0
# About half of all stay longer than the mean. A share of it is added, or so many standard deviations where they are
# more, as they are where shapes or models are mixed.
_CAUTION, _DEVIATIONS = 0.25, 2.0
_PRIOR = 1.0  # how far numbers in work must vary, squared, before their stays say more than that stays grow with them


class Flow:
    """How long a request that came now would stay, by what others stayed that met so many when they came.

    Through those stays goes a line, so that a service with little to do is not taken for a slow one: where few are in
    work, few leave. Whatever holds requests up counts, decoding as much as devices. All calls come from the event loop.
    """

    def __init__(self) -> None:
        self._count = 0
        self._stays = _Line()
        self._left = -math.inf  # when the last one did

    @contextmanager
    def one(self, is_heavy: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """A request, in work as long as the block runs; one that raises has not been done.

        Args:
            is_heavy: asked at the end, whether it had several pictures: nothing is learned from how long those stay.
        """
        came = time.monotonic()
        self._count += 1
        met, is_done = self._count, False
        try:
            yield
            is_done = True
        finally:
            self._count -= 1
            if not is_heavy():
                self._has_left(met, came, time.monotonic(), is_done)

    def seconds_for_one_more(self) -> float:
        """0 where nothing is in work: an idle service tries whatever it is asked.

        So does in time one that has refused everything of late: what it knows fades once nothing has been learned for
        longer than it says that a request stays.
        """
        if not self._count:
            return 0.0
        mean_s = self._stays.at(self._count + 1)
        expected_s = mean_s + max(_CAUTION * mean_s, _DEVIATIONS * self._stays.deviation)
        silent_s = time.monotonic() - self._left
        return expected_s * (math.exp(1 - silent_s / mean_s) if silent_s > mean_s > 0 else 1.0)

    def _has_left(self, met: int, came: float, now: float, is_done: bool) -> None:
        stay_s = now - came
        # What was given up or refused says only that it would have stayed longer than it did.
        if is_done or stay_s > self._stays.at(met):
            worked_s = min(stay_s, now - self._left)
            self._stays.add(met, stay_s, past=min(1 - 1 / _MEMORY, math.exp(-worked_s / _MEMORY_S)))
            self._left = now


class _Line:
    """The line of least squares through points, of which the late ones count more, and the first is (1, 0).

    It rises, and where x is 0 it is not below 0.
    """

    def __init__(self) -> None:
        self._weight, self._x, self._y = 1.0, 1.0, 0.0
        self._xx, self._xy, self._yy = 1.0, 0.0, 0.0

    def add(self, x: float, y: float, past: float) -> None:
        """One more point; all before count `past` times what they did."""
        self._weight = past * self._weight + 1
        self._x, self._y = past * self._x + x, past * self._y + y
        self._xx, self._xy, self._yy = past * self._xx + x * x, past * self._xy + x * y, past * self._yy + y * y

    def at(self, x: float) -> float:
        """Its y. Where the points have one x, the line goes through the origin."""
        return self._mean_y + self._slope * (x - self._mean_x)

    @property
    def deviation(self) -> float:
        """Of the points from the line, along y: the root of the mean of the squares."""
        slope, varies = self._slope, self._yy / self._weight - self._mean_y**2
        return math.sqrt(max(0.0, varies - 2 * slope * self._xy_varies + slope**2 * self._x_varies))

    @property
    def _slope(self) -> float:
        steepest = self._mean_y / self._mean_x
        return min(max(0.0, (self._xy_varies + _PRIOR * steepest) / (self._x_varies + _PRIOR)), steepest)

    @property
    def _mean_x(self) -> float:
        return self._x / self._weight

    @property
    def _mean_y(self) -> float:
        return self._y / self._weight

    @property
    def _x_varies(self) -> float:
        return self._xx / self._weight - self._mean_x**2

    @property
    def _xy_varies(self) -> float:
        return self._xy / self._weight - self._mean_x * self._mean_y
