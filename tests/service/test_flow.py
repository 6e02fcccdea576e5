"""How long a request would stay, beside a queue worked out event by event."""

import heapq
import itertools
import math
import random
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import numpy as np
import pytest

from dsg.service import flow as flow_module
from dsg.service.flow import Flow
from dsg.service.problems import CLIENT_GONE, Problem, deadline_passed


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(flow_module.time, "monotonic", lambda: clock.now)
    return clock


def leave(stays: ExitStack, is_late: bool) -> None:
    if not is_late:
        stays.close()
        return
    error = deadline_passed()
    assert not stays.__exit__(type(error), error, None)


class Line:
    """Requests that are answered one after the other, each in the same time; one whose deadline has passed when its
    turn comes is given up."""

    def __init__(self, clock: Clock, seconds: float, deadline_s: float, careful: bool) -> None:
        self._clock, self._seconds, self._deadline_s, self._careful = clock, seconds, deadline_s, careful
        self.in_time = self.late = self.refused = 0
        self.flow = Flow()
        self.stays: list[tuple[int, float]] = []
        """Of those that were in time: how many were in work when one came, itself included, and how long it stayed."""

    def run(self, arrivals: list[float]) -> None:
        flow, free = self.flow, 0.0
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
            if not is_late:
                self.stays.append((len(leaving) + 1, begins + self._seconds - came))
            heapq.heappush(leaving, (min(begins + self._seconds, gives_up), number, is_late, stays))


class Batches:
    """A device that runs what waits in batches of up to four, each of which has a price of its own; before and after
    it each request takes a time beside the others."""

    capacity = 4 / (0.002 + 4 * 0.004)

    def __init__(self, clock: Clock, deadline_s: float, around_s: float = 0.0) -> None:
        self._clock, self._deadline_s, self._around_s = clock, deadline_s, around_s
        self.in_time = self.late = self.refused = 0
        self._flow = Flow()
        self._waiting: deque[tuple[float, ExitStack]] = deque()
        self._is_free = True
        self._order = itertools.count()
        self._coming: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, arrivals: list[float]) -> None:
        for came in arrivals:
            self._at(came, self._come)
        while self._coming:
            self._clock.now, _, happens = heapq.heappop(self._coming)
            happens()

    def _at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (when, next(self._order), happens))

    def _come(self) -> None:
        if self._flow.seconds_for_one_more() > self._deadline_s:
            self.refused += 1
            return
        stays = ExitStack()
        stays.enter_context(self._flow.one())
        self._at(self._clock.now + self._around_s, partial(self._wait, (self._clock.now, stays)))

    def _wait(self, request: tuple[float, ExitStack]) -> None:
        self._waiting.append(request)
        self._begin()

    def _begin(self) -> None:
        if self._is_free and self._waiting:
            self._is_free = False
            count = next(size for size in (4, 2, 1) if size <= len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            self._at(self._clock.now + 0.002 + count * 0.004, partial(self._end, batch))

    def _end(self, batch: list[tuple[float, ExitStack]]) -> None:
        self._is_free = True
        self._begin()
        for request in batch:
            self._at(self._clock.now + self._around_s, partial(self._leave, *request))

    def _leave(self, came: float, stays: ExitStack) -> None:
        is_late = self._clock.now - came > self._deadline_s
        leave(stays, is_late)
        self.late, self.in_time = self.late + is_late, self.in_time + (not is_late)


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


def stay(flow: Flow, clock: Clock, seconds: float, error: BaseException | None = None) -> None:
    """One request that stays so long, beside what is in work."""
    with suppress(BaseException if error else ()), flow.one():
        clock.now += seconds
        if error:
            raise error


FAILURES = [
    deadline_passed(),
    Problem(CLIENT_GONE, "client_gone", ""),
    Problem(429, "queue_full", ""),
    Problem(400, "broken_picture", ""),
    CancelledError(),
]


@pytest.mark.parametrize("error", FAILURES)
def test_what_is_not_done_says_at_most_that_it_would_have_stayed_longer(clock: Clock, error: BaseException) -> None:
    flow = Flow()
    with flow.one():
        for _ in range(200):
            stay(flow, clock, 1.0)
            for _ in range(4):
                stay(flow, clock, 0.25, error)
        assert flow.seconds_for_one_more() == pytest.approx(1.25 * 1.0, rel=0.01)
        for _ in range(8):
            stay(flow, clock, 4.0, error)
        assert flow.seconds_for_one_more() > 1.25 * 3.0


def test_a_service_that_slows_down_is_known_to_be_slow_within_seconds(clock: Clock) -> None:
    flow = Flow()
    with flow.one():
        for _ in range(200):
            stay(flow, clock, 0.25)
        assert flow.seconds_for_one_more() == pytest.approx(1.25 * 0.25, rel=0.01)
        for _ in range(6):
            stay(flow, clock, 1.0)
        assert flow.seconds_for_one_more() > 1.25 * 0.6


def test_heavy_requests_are_forgotten_though_light_ones_come_alone(clock: Clock) -> None:
    flow = Flow()
    for _ in range(200):
        with flow.one(), flow.one():
            clock.now += 3.0
    with flow.one():
        assert flow.seconds_for_one_more() > 3.0  # with these a second one would be late
    for _ in range(20):
        stay(flow, clock, 0.5)
    with flow.one():
        assert flow.seconds_for_one_more() < 3.0


def test_nothing_is_learned_from_requests_with_many_pictures(clock: Clock) -> None:
    flow = Flow()
    for _ in range(50):
        with flow.one(lambda: True):
            clock.now += 5.0
            for _ in range(4):
                stay(flow, clock, 0.1)
    with flow.one():
        assert flow.seconds_for_one_more() == pytest.approx(1.25 * 0.1, rel=0.01)


def test_what_nobody_tries_any_more_is_tried_again(clock: Clock) -> None:
    """A request with many pictures is always in work, and all others have been refused since one was late."""
    flow = Flow()
    with flow.one(lambda: True):
        stay(flow, clock, 3.0, deadline_passed())
        expected = flow.seconds_for_one_more()
        assert expected > 3.0
        clock.now += 1.0
        assert flow.seconds_for_one_more() == expected
        clock.now += 3.0
        assert flow.seconds_for_one_more() < 3.0


def test_an_idle_service_tries_whatever_it_is_asked(clock: Clock) -> None:
    flow = Flow()
    with flow.one():
        clock.now += 50.0
        assert flow.seconds_for_one_more() == 0.0  # nothing has left yet
    assert flow.seconds_for_one_more() == 0.0


def test_an_hour_without_requests_makes_nothing_forgotten(clock: Clock) -> None:
    flow = Flow()
    for _ in range(200):
        stay(flow, clock, 0.1)
    clock.now += 3600.0
    stay(flow, clock, 2.0)  # the first after a while may be slow
    with flow.one():
        assert flow.seconds_for_one_more() < 2.0


@pytest.mark.parametrize("seed", range(3))
def test_stays_by_how_many_were_met_lie_on_a_line_of_least_squares(clock: Clock, seed: int) -> None:
    """As numpy finds it, from the same stays."""
    line = Line(clock, 0.005, math.inf, careful=False)
    line.run(arrivals(0.8 / 0.005, 10.0, seed))
    weights = [(1 - 1 / 32) ** age for age in range(len(line.stays))][::-1]
    met_by, stays = map(np.array, zip(*line.stays, strict=True))
    slope, height = np.polyfit(met_by, stays, 1, w=np.sqrt(weights))
    deviation = math.sqrt(np.average((stays - height - slope * met_by) ** 2, weights=weights))
    with ExitStack() as beside:
        for met in range(2, 20):
            beside.enter_context(line.flow.one())
            mean = height + slope * met
            expected = mean + max(0.25 * mean, 2 * deviation)
            assert line.flow.seconds_for_one_more() == pytest.approx(expected, rel=0.1)


def test_where_some_stay_much_longer_than_others_two_deviations_are_added(clock: Clock) -> None:
    flow = Flow()
    with flow.one(lambda: True):
        for _ in range(200):
            stay(flow, clock, 0.1)
            stay(flow, clock, 0.3)
        assert flow.seconds_for_one_more() == pytest.approx(0.2 + 2 * 0.1, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [0.5, 0.7, 0.9, 1.5])
def test_where_few_come_few_leave_and_the_service_is_no_slower_for_it(clock: Clock, load: float, seed: int) -> None:
    """Stages before and after a device that runs batches; deadlines of six times what one request takes alone."""
    device = Batches(clock, deadline_s=0.1, around_s=0.01)
    device.run(arrivals(load * device.capacity, 40.0, seed))
    asked = device.in_time + device.late + device.refused
    most = {0.5: 0.0001, 0.7: 0.001, 0.9: 0.03, 1.5: 0.36}[load]
    assert device.refused < most * asked and device.late < 0.002 * asked
