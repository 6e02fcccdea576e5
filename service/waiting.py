"""Pictures that wait for a device, in buckets, and which of them go next."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsg.service.pace import BatchLimit

if TYPE_CHECKING:
    from dsg.model.network.detections import Detections
    from dsg.model.network.predictor import PreparedImage
    from dsg.service.models import ServedModel


@dataclass(frozen=True)
class Outcome:
    """What a device made of one picture."""

    detections: "Detections"
    queue_s: float
    """Time it waited for the device, seconds."""
    infer_s: float
    """Time its batch took on the device, seconds."""
    batch_size: int
    """Pictures that ran together, this one included."""
    known: float = field(default_factory=time.monotonic)
    """When the device's answer was there, on the clock of `time.monotonic`."""


@dataclass(eq=False)
class Ticket:
    """One picture on its way through queue and device."""

    model: "ServedModel"
    picture: "PreparedImage"
    deadline: float
    """On the clock of `time.monotonic`."""
    score_threshold: float
    future: "Future[Outcome]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    turn: float = 0.0
    """When it would have come, had the pictures of its request come one by one, as fast as they can be run beside what
    waits: others wait for the one whose turn it is, and not for all of a request with many. Without it, `arrived`."""
    request: object = field(default_factory=object)
    """The same for all pictures of one."""
    warm_up: bool = False
    """No client waits for it; neither counted nor measured."""
    alone: bool = False
    """Runs in a batch of its own, with no other beside it: a worker died with it and others, or it had no memory."""
    failures: int = 0
    """Times that it ran alone out of memory, or took a worker with it."""

    def __post_init__(self) -> None:
        self.turn = self.turn or self.arrived

    @property
    def pixels(self) -> int:
        """Padded pixels: what it costs."""
        return math.prod(self.picture.padded_size)

    @property
    def bucket(self) -> tuple[int, tuple[int, int], int]:
        """Pictures of one bucket can run together: of one model (after a reload, the old one and the new one of a
        name run apart) and of one padded shape."""
        return id(self.model), self.picture.padded_size, id(self) if self.alone else 0


class WaitingPictures:
    """Buckets. Holds no lock: its owner does.

    The fullest bucket goes first, since full batches are what makes a device quick; but time waited counts as well, so
    that a rare shape is never starved: a picture is never overtaken by one whose turn was more than `ageing_s` later.

    Args:
        ageing_s: seconds of waiting that count as much as a full batch.
    """

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s
        # In each bucket the one whose turn is next is the first: dicts keep their order, and lose a ticket at once.
        self._buckets: dict[tuple[int, tuple[int, int], int], dict[int, Ticket]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def alone(self) -> int:
        """How many wait that have to run alone."""
        return len(self._buckets_alone())

    @property
    def requests(self) -> int:
        """How many requests have pictures that wait."""
        return len({id(ticket.request) for bucket in self._buckets.values() for ticket in bucket.values()})

    def pixels_before(self, turn: float) -> int:
        """Padded pixels of those whose turn is not after this one, on the clock of `time.monotonic`."""
        buckets = self._buckets.values()
        return sum(ticket.pixels for bucket in buckets for ticket in bucket.values() if ticket.turn <= turn)

    def has_full(self, limit: BatchLimit) -> bool:
        """Whether there is a batch that could not be larger."""
        for bucket in self._buckets.values():
            oldest = next(iter(bucket.values()))
            if oldest.alone or len(bucket) >= limit.size(limit.most(oldest.pixels)):
                return True
        return False

    def add(self, ticket: Ticket) -> None:
        """Put a picture behind those of its bucket whose turn is before its own."""
        bucket = self._buckets.setdefault(ticket.bucket, {})
        is_last = not bucket or next(reversed(bucket.values())).turn <= ticket.turn
        bucket[id(ticket)] = ticket
        if not is_last:
            self._buckets[ticket.bucket] = dict(sorted(bucket.items(), key=lambda entry: entry[1].turn))
        self._count += 1

    def discard(self, ticket: Ticket) -> bool:
        """Take a picture out; whether it was there."""
        bucket = self._buckets.get(ticket.bucket, {})
        if bucket.pop(id(ticket), None) is None:
            return False
        if not bucket:
            del self._buckets[ticket.bucket]
        self._count -= 1
        return True

    def take(self, limit: BatchLimit, now: float, seconds: Callable[[int], float] = lambda pixels: 0.0) -> list[Ticket]:
        """The next batch, oldest first: of one bucket, within the limit, at least one picture; empty if none waits.

        What has to run alone goes first: there is little of it, and all else waits for it to get out of the way.

        Args:
            limit: how large it may be.
            now: on the clock of `time.monotonic`.
            seconds: what the device takes for a batch of so many padded pixels, as measured: a batch stays so small
                that it is done by the deadlines of its pictures. On a CPU, which gains nothing from batches, large ones
                would all be late.
        """
        if not self._buckets:
            return []
        buckets = self._buckets_alone() or self._buckets.values()
        tickets: list[Ticket] = []
        soonest = math.inf
        for ticket in max(buckets, key=lambda bucket: self._urgency(bucket, limit, now)).values():
            pixels = (len(tickets) + 1) * ticket.pixels
            done = now + seconds(pixels)
            if tickets and (
                len(tickets) == limit.pictures or pixels > limit.pixels or done > min(soonest, ticket.deadline)
            ):
                break
            tickets.append(ticket)
            # One that is late even alone holds nobody else back.
            soonest = min(soonest, ticket.deadline) if done <= ticket.deadline else soonest
        tickets = tickets[: limit.size(len(tickets))]
        for ticket in tickets:
            self.discard(ticket)
        return tickets

    def take_all(self) -> list[Ticket]:
        """Everything, in no order."""
        tickets = [ticket for bucket in self._buckets.values() for ticket in bucket.values()]
        self._buckets.clear()
        self._count = 0
        return tickets

    def _buckets_alone(self) -> list[dict[int, Ticket]]:
        return [bucket for bucket in self._buckets.values() if next(iter(bucket.values())).alone]

    def _urgency(self, bucket: dict[int, Ticket], limit: BatchLimit, now: float) -> float:
        oldest = next(iter(bucket.values()))
        return min(1.0, len(bucket) / limit.most(oldest.pixels)) + (now - oldest.turn) / self._ageing_s
