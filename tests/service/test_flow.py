"""How long a request would stay, beside a queue worked out event by event."""

import heapq
import math
import random
from asyncio import CancelledError
from collections import deque
from contextlib import ExitStack

import pytest

from dsg.service import admission
from dsg.service.admission import Flow
from dsg.service.problems import CLIENT_GONE, Problem, deadline_passed


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock.now)
    return clock


def leave(stays: ExitStack, is_late: bool, error: BaseException | None = None) -> None:
    if not is_late:
        stays.close()
        return
    error = error or deadline_passed()
    assert not stays.__exit__(type(error), error, None)


class Line:
    """Requests that are answered one after the other, each in the same time; one whose deadline has passed when its
    turn comes is given up."""

    def __init__(self, clock: Clock, seconds: float, deadline_s: float, careful: bool) -> None:
        self._clock, self._seconds, self._deadline_s, self._careful = clock, seconds, deadline_s, careful
        self.in_time = self.late = self.refused = 0

    def run(self, arrivals: list[float]) -> None:
        flow, free = Flow(), 0.0
        leaving: list[tuple[float, int, bool, ExitStack]] = []
        for number, came in enumerate([*arrivals, math.inf]):
            while leaving and leaving[0][0] <= came:
                self._clock.now, _, is_late, stays = heapq.heappop(leaving)
                leave(stays, is_late)
            if came == math.inf:
                return
            self._clock.now, gives_up = came, came + self._deadline_s
            if self._careful and flow.seconds_for_one_more() > self._deadline_s:
                self.refused += 1
                continue
            begins = max(free, came)
            if begins < gives_up:
                free = begins + self._seconds
            is_late = begins + self._seconds > gives_up
            self.late, self.in_time = self.late + is_late, self.in_time + (not is_late)
            stays = ExitStack()
            stays.enter_context(flow.one())
            heapq.heappush(leaving, (min(begins + self._seconds, gives_up), number, is_late, stays))


class Batches:
    """A device that runs what waits in batches of up to four, each of which has a price of its own."""

    capacity = 4 / (0.002 + 4 * 0.004)

    def __init__(self, clock: Clock, deadline_s: float) -> None:
        self._clock, self._deadline_s = clock, deadline_s
        self.in_time = self.late = self.refused = 0

    def run(self, arrivals: list[float]) -> None:
        flow, ends = Flow(), math.inf
        waiting: deque[tuple[float, ExitStack]] = deque()
        running: list[tuple[float, ExitStack]] = []
        for came in [*arrivals, math.inf]:
            while ends <= came and running:
                self._clock.now = ends
                for start, stays in running:
                    stays.close()
                    is_late = ends - start > self._deadline_s
                    self.late, self.in_time = self.late + is_late, self.in_time + (not is_late)
                running, ends = self._next(waiting)
            if came == math.inf:
                return
            self._clock.now = came
            if flow.seconds_for_one_more() > self._deadline_s:
                self.refused += 1
                continue
            stays = ExitStack()
            stays.enter_context(flow.one())
            waiting.append((came, stays))
            if not running:
                running, ends = self._next(waiting)

    def _next(self, waiting: deque[tuple[float, ExitStack]]) -> tuple[list[tuple[float, ExitStack]], float]:
        count = next((size for size in (4, 2, 1) if size <= len(waiting)), 0)
        ends = self._clock.now + 0.002 + count * 0.004 if count else math.inf
        return [waiting.popleft() for _ in range(count)], ends


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    chance, came, found = random.Random(seed), 0.0, []
    while (came := came + chance.expovariate(rate)) < seconds:
        found.append(came)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [1.5, 2.0, 5.0])
def test_under_too_much_load_what_is_taken_is_in_time(clock: Clock, load: float, seed: int) -> None:
    seconds, deadline_s, total_s = 0.005, 0.15, 20.0
    come = arrivals(load / seconds, total_s, seed)
    careful, careless = (Line(clock, seconds, deadline_s, careful) for careful in (True, False))
    careful.run(come)
    careless.run(come)
    possible = total_s / seconds
    assert careful.in_time > 0.95 * possible and careful.late < 0.05 * possible
    assert careless.in_time < 0.5 * possible  # all at the last moment, and most a little after it


@pytest.mark.parametrize("seed", range(3))
def test_under_a_load_that_it_can_bear_nothing_is_refused(clock: Clock, seed: int) -> None:
    line = Line(clock, 0.005, 0.15, careful=True)
    line.run(arrivals(0.7 / 0.005, 20.0, seed))
    assert (line.refused, line.late) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_batches_make_a_device_quicker_the_more_waits(clock: Clock, seed: int) -> None:
    device = Batches(clock, deadline_s=0.11)
    device.run(arrivals(0.7 * device.capacity, 60.0, seed))
    assert device.late == 0 and device.refused <= 1
    device = Batches(clock, deadline_s=0.11)
    device.run(arrivals(1.5 * device.capacity, 20.0, seed))
    assert device.in_time > 0.95 * 20 * device.capacity and device.late < 0.02 * 20 * device.capacity


@pytest.mark.parametrize(
    "error",
    [deadline_passed(), Problem(CLIENT_GONE, "client_gone", ""), Problem(429, "queue_full", ""), CancelledError()],
)
def test_what_is_given_up_says_nothing_of_what_is_done(clock: Clock, error: BaseException) -> None:
    flow = Flow()
    with ExitStack() as always:
        always.enter_context(flow.one())
        for _ in range(200):  # one is done each second, and four are given up meanwhile
            for _ in range(4):
                stays = ExitStack()
                stays.enter_context(flow.one())
                clock.now += 0.25
                leave(stays, is_late=True, error=error)
            with flow.one():
                pass
        assert flow.seconds_for_one_more() == pytest.approx(1.25 * 2 * 1.0, rel=0.01)


def test_a_service_that_slows_down_is_known_to_be_slow_within_seconds(clock: Clock) -> None:
    flow = Flow()
    with flow.one():
        for _ in range(200):
            with flow.one():
                clock.now += 0.25
        assert flow.seconds_for_one_more() == pytest.approx(1.25 * 2 * 0.25, rel=0.01)
        for _ in range(6):
            with flow.one():
                clock.now += 1.0
        assert flow.seconds_for_one_more() > 1.25 * 2 * 0.6


def test_heavy_requests_are_forgotten_though_light_ones_come_alone(clock: Clock) -> None:
    flow = Flow()
    with flow.one():
        for _ in range(200):
            with flow.one():
                clock.now += 2.0
    with flow.one():
        assert flow.seconds_for_one_more() > 3.0  # with these a second one would be late
    for _ in range(20):
        with flow.one():
            clock.now += 0.5
    with flow.one():
        assert flow.seconds_for_one_more() < 3.0


def test_an_idle_service_tries_whatever_it_is_asked(clock: Clock) -> None:
    flow = Flow()
    with flow.one():
        clock.now += 50.0
        assert flow.seconds_for_one_more() == 0.0  # nothing has left yet
    with flow.one():
        clock.now += 1000.0
    with flow.one():
        assert flow.seconds_for_one_more() == 0.0  # one came after the other had left, however long it stayed
        with flow.one():
            clock.now += 1.0
        clock.now += 16.0
    assert flow.seconds_for_one_more() == 0.0
    with flow.one():
        assert flow.seconds_for_one_more() == pytest.approx(1.25 * 2 * 16.0 / (1 + 16 * math.exp(-16.0 / 4)))
