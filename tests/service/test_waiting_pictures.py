"""Which pictures go next: a simple list of all that wait says what is right."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsg.service.devices import Ran
from dsg.service.lane import Lane
from dsg.service.metrics import Metrics
from dsg.service.pace import BatchLimit, Pace
from dsg.service.shared_queue import Batch, Queue
from dsg.service.waiting import Ticket, WaitingPictures
from dsg.service.warm_up import warm_up_batches

MODEL = SimpleNamespace(number=0)


def ticket(height: int, arrived: float, width: int = 32) -> Ticket:
    picture = SimpleNamespace(padded_size=(height, width), pixels=np.zeros(0))
    return Ticket(MODEL, picture, deadline=1e9, score_threshold=0.0, arrived=arrived)


def test_the_fullest_goes_first_and_the_oldest_within_it() -> None:
    waiting = WaitingPictures(ageing_s=100.0)
    few = [ticket(32, 0.0), ticket(32, 0.1)]
    many = [ticket(64, 0.2 + number / 10) for number in range(5)]
    for one in [*few, *many]:
        waiting.add(one)
    limit = BatchLimit(pictures=4, pixels=10**9)
    assert waiting.take(limit, now=1.0) == many[:4]
    assert waiting.take(limit, now=1.0) == few
    assert waiting.take(limit, now=1.0) == many[4:]
    assert waiting.take(limit, now=1.0) == []


def test_turns_count_and_not_when_pictures_came() -> None:
    waiting = WaitingPictures(ageing_s=1e-9)
    request = object()
    many = [ticket(32, 0.0) for _ in range(4)]
    for number, one in enumerate(many):
        one.turn, one.request = float(number), request
        waiting.add(one)
    late, other_shape = ticket(32, 1.5), ticket(64, 2.5)
    waiting.add(late)
    waiting.add(other_shape)
    assert waiting.requests == 3
    assert [waiting.pixels_before(turn) for turn in (-1.0, 0.0, 1.5)] == [0, 32 * 32, 3 * 32 * 32]
    limit = BatchLimit(pictures=1, pixels=10**9)
    taken = [waiting.take(limit, now=9.0)[0] for _ in range(6)]
    assert taken == [many[0], many[1], late, many[2], other_shape, many[3]]
    assert waiting.requests == 0


def test_what_has_to_run_alone_goes_first_and_alone() -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    many, suspects = [ticket(32, number / 10) for number in range(4)], [ticket(32, 5.0), ticket(32, 6.0)]
    for one in suspects:
        one.alone = True
    for one in [*many, *suspects]:
        waiting.add(one)
    limit = BatchLimit(pictures=4, pixels=10**9)
    assert waiting.alone == 2 and waiting.take(limit, now=100.0) == suspects[:1]
    assert waiting.alone == 1 and waiting.take(limit, now=100.0) == suspects[1:]
    assert waiting.alone == 0 and waiting.take(limit, now=100.0) == many


def test_pixels_bound_a_batch_and_a_single_one_always_goes() -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    for number in range(5):
        waiting.add(ticket(64, number))
    limit = BatchLimit(pictures=4, pixels=2 * 64 * 32)
    assert len(waiting.take(limit, now=9.0)) == 2
    limit = BatchLimit(pictures=4, pixels=1)
    assert len(waiting.take(limit, now=9.0)) == 1
    assert (len(waiting), waiting.pixels_before(9.0)) == (2, 2 * 64 * 32)


def test_a_batch_is_full_when_no_picture_more_would_go_with_it() -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    few_sizes = BatchLimit(pictures=12, pixels=7 * 64 * 32, few_sizes=True)
    assert not waiting.has_full(few_sizes)
    for number in range(6):
        # By pictures 12 of the small ones, by pixels 7 of the large ones, of which 4 go at once.
        assert waiting.has_full(few_sizes) == (number >= 4)
        waiting.add(ticket(64, number))
        waiting.add(ticket(32, number))
    assert not waiting.has_full(BatchLimit(pictures=12, pixels=7 * 64 * 32))
    waiting.add(ticket(64, 6.0))
    assert waiting.has_full(BatchLimit(pictures=12, pixels=7 * 64 * 32))
    assert waiting.has_full(BatchLimit(pictures=6, pixels=10**9))
    suspect = ticket(96, 7.0)
    suspect.alone = True
    waiting.add(suspect)
    assert waiting.has_full(BatchLimit(pictures=99, pixels=10**9))


@pytest.mark.parametrize(
    ("deadlines", "sizes"),
    [
        ([99.0] * 5, [5]),
        ([12.5, 99.0, 99.0, 99.0, 99.0], [2, 3]),  # the first one is in time in a batch of two
        ([99.0, 99.0, 99.0, 12.5, 99.0], [3, 2]),
        ([10.2, 99.0, 99.0], [3]),  # the first one is late even alone, and holds nobody back
        ([10.2, 12.5, 99.0], [2, 1]),
    ],
)
def test_a_batch_is_no_larger_than_its_deadlines_allow(deadlines: list[float], sizes: list[int]) -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    for number, deadline in enumerate(deadlines):
        one = ticket(32, number / 10)
        one.deadline = deadline
        waiting.add(one)
    limit, found = BatchLimit(pictures=8, pixels=10**9), []
    while batch := waiting.take(limit, now=10.0, seconds=lambda pixels: pixels / 1024):  # a second a picture
        found.append(len(batch))
    assert found == sizes


def test_what_a_batch_takes_is_known_by_its_size() -> None:
    queue = Queue(WaitingPictures(ageing_s=1.0), Metrics())
    lane = Lane(queue, BatchLimit(pictures=8, pixels=10**9))
    assert lane.seconds(1024) == 0.0

    def ran(pictures: int, seconds: float) -> None:
        batch = Batch([ticket(32, 0.0) for _ in range(pictures)], 0.0, lambda: None, threading.Event())
        lane.ended(batch, Ran([None] * pictures, seconds, {}, launched=lane._freed, freed=lane._freed + seconds))
        queue.pace.ran(pictures, batch.pixels, seconds)

    ran(1, 6.0)
    assert lane.seconds(1024) == 6.0 and lane.seconds(4 * 1024) == pytest.approx(24.0)
    ran(4, 18.0)
    for _ in range(20):
        ran(1, 6.0)
    assert lane.seconds(4 * 1024) == 18.0  # not four times as much as one
    ran(8, 250.0)  # the first of a shape
    for _ in range(20):
        ran(1, 6.0)
    assert lane.seconds(8 * 1024) < 50.0  # and so it is tried again


def test_pictures_of_two_models_or_marked_alone_do_not_meet() -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    other = ticket(32, 1.0)
    other.model = SimpleNamespace(number=1)
    alone = ticket(32, 2.0)
    alone.alone = True
    for one in (ticket(32, 0.0), other, alone, ticket(32, 3.0)):
        waiting.add(one)
    sizes = [len(waiting.take(BatchLimit(8, 10**9), now=4.0)) for _ in range(3)]
    assert sorted(sizes) == [1, 1, 2]


@given(
    arrivals=st.lists(st.tuples(st.integers(1, 6), st.floats(0, 3)), min_size=1, max_size=60),
    ageing_s=st.sampled_from([0.1, 0.5]),
    pictures=st.integers(1, 5),
)
def test_no_picture_is_overtaken_by_one_that_came_much_later(
    arrivals: list[tuple[int, float]], ageing_s: float, pictures: int
) -> None:
    waiting = WaitingPictures(ageing_s)
    left = [ticket(32 * shape, at) for shape, at in arrivals]  # the turns of a request are ahead of others'
    for one in left:
        waiting.add(one)
    limit = BatchLimit(pictures, 10**9)
    while left:
        assert len(waiting) == len(left) and waiting.pixels_before(10.0) == sum(one.pixels for one in left)
        batch = waiting.take(limit, now=10.0)
        assert 1 <= len(batch) <= pictures and len({one.bucket for one in batch}) == 1
        left = [one for one in left if one not in batch]
        oldest = min((one.arrived for one in left), default=1e9)
        # The head of the batch is at most `ageing_s` younger than anything that still waits.
        assert batch[0].arrived <= oldest + ageing_s + 1e-9


@given(kept=st.lists(st.booleans(), min_size=1, max_size=20))
def test_what_is_discarded_never_comes(kept: list[bool]) -> None:
    waiting = WaitingPictures(1.0)
    tickets = [ticket(32 * (1 + number % 3), number) for number in range(len(kept))]
    for one in tickets:
        waiting.add(one)
    for one, keep in zip(tickets, kept, strict=True):
        if not keep:
            assert waiting.discard(one) and not waiting.discard(one)
    seen = []
    while batch := waiting.take(BatchLimit(3, 10**9), now=99.0):
        seen += batch
    assert set(map(id, seen)) == {id(one) for one, keep in zip(tickets, kept, strict=True) if keep}
    assert waiting.pixels_before(99.0) == 0


def test_the_limit_halves_and_recovers_more_patiently_each_time() -> None:
    limit = BatchLimit(8, 1000)
    limit.out_of_memory(800)
    assert limit.pixels == 400
    batches = []
    for _ in range(2):
        count = 0
        while limit.pixels < 500:
            limit.passed()
            count += 1
        batches.append(count)
        limit.out_of_memory(limit.pixels)
        limit.pixels = 400
    assert batches == [32, 64]


def test_pace_is_a_running_mean_by_picture_and_by_pixel() -> None:
    pace = Pace()
    assert pace.seconds_for_pictures(5) == 0
    pace.ran(pictures=2, pixels=1000, seconds=1.0)
    assert pace.seconds_for_pictures(4) == pytest.approx(2.0)
    assert pace.seconds_for_pixels(500) == pytest.approx(0.5)
    pace.ran(pictures=1, pixels=1000, seconds=1.0)
    assert pace.seconds_for_pictures(1) == pytest.approx(0.8 * 0.5 + 0.2 * 1.0)


@pytest.mark.parametrize(("most", "sizes"), [(8, [8, 8, 4, 1]), (6, [6, 6, 6, 2, 1]), (1, [1] * 21)])
def test_batches_of_few_sizes(most: int, sizes: list[int]) -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    tickets = [ticket(32, number / 10) for number in range(21)]
    for one in tickets:
        waiting.add(one)
    limit, found = BatchLimit(most, 10**9, few_sizes=True), []
    while batch := waiting.take(limit, now=9.0):
        found.append(batch)
    assert [len(batch) for batch in found] == sizes
    assert [one for batch in found for one in batch] == tickets  # the oldest first, and none is lost


def test_pixels_that_hold_five_pictures_give_batches_of_four() -> None:
    waiting = WaitingPictures(ageing_s=1.0)
    for number in range(7):
        waiting.add(ticket(64, number))
    limit = BatchLimit(8, 5 * 64 * 32, few_sizes=True)
    assert [len(waiting.take(limit, now=9.0)) for _ in range(3)] == [4, 2, 1]


@pytest.mark.parametrize(
    ("max_batch", "max_batch_pixels", "counts"),
    [(8, 10**9, [1, 2, 4, 8]), (6, 10**9, [1, 2, 4, 6]), (8, 5 * 480 * 640, [1, 2, 4]), (8, 1, [1])],
)
def test_a_gpu_is_warmed_with_the_batches_that_it_will_run(
    max_batch: int, max_batch_pixels: int, counts: list[int]
) -> None:
    model = SimpleNamespace(
        prepare=lambda pixels: SimpleNamespace(pixels=pixels, padded_size=pixels.shape[:2])  # all multiples of 32
    )
    batches = warm_up_batches(model, max_batch, max_batch_pixels, on_gpu=True)
    twice = [count for count in counts for _ in range(2)]
    assert [len(batch) for batch in batches] == twice * 2
    assert [len(batch) for batch in warm_up_batches(model, max_batch, max_batch_pixels, on_gpu=False)] == [1]
