"""What the devices' threads share: the queue, and how its pictures are given up."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from dsg.service.devices import Ran
from dsg.service.metrics import Metrics
from dsg.service.pace import Pace
from dsg.service.waiting import Outcome, Ticket, WaitingPictures


class DeadlinePassed(Exception):
    """A picture's deadline passed before a device came to it."""


class DeviceStopped(Exception):
    """The batcher was closed before a device came to a picture."""


@dataclass
class Queue:
    """What the devices' threads share."""

    waiting: WaitingPictures
    metrics: Metrics
    pace: Pace = field(default_factory=Pace)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False
    threads: int = 0
    """That take from it."""
    idle: int = 0
    """Of them, those whose device has nothing to do."""

    def count(self) -> None:
        """Tell the metrics what waits."""
        self.metrics.queued.set(len(self.waiting))


@dataclass
class Batch:
    """Pictures that a device was given together."""

    tickets: list[Ticket]
    began: float
    end: Callable[[], Ran]
    done: threading.Event

    @property
    def pixels(self) -> int:
        return sum(ticket.pixels for ticket in self.tickets)


def fail(tickets: list[Ticket], error: Exception) -> None:
    """Answer pictures with an error, those apart whose clients have gone."""
    for ticket in tickets:
        if not ticket.future.done() and (ticket.future.running() or ticket.future.set_running_or_notify_cancel()):
            ticket.future.set_exception(error)


def forget_when_cancelled(queue: Queue, ticket: Ticket) -> None:
    """Have a picture leave the queue at once when its client gives up.

    Not left until its turn: clients that hang up by the hundred must not fill the memory.
    """
    # A future keeps its callbacks, and the ticket has the future: with a ring of them the pixels of each picture would
    # lie about until Python looks for such rings.
    ticket.future.add_done_callback(partial(_forget, queue, weakref.ref(ticket)))


def _forget(queue: Queue, reference: "weakref.ref[Ticket]", future: "Future[Outcome]") -> None:
    ticket = reference()
    if ticket is None or not future.cancelled():
        return
    with queue.changed:
        was_waiting = queue.waiting.discard(ticket)
        queue.count()
    if was_waiting:
        queue.metrics.dropped.labels("cancelled").inc()
