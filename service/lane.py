"""What one device runs and is to run next, and when the next batch is sent to it."""

import time
from collections import deque

from dsg.service.devices import Ran
from dsg.service.pace import BatchLimit, Foresight
from dsg.service.shared_queue import Batch, Queue
from dsg.service.waiting import Ticket


class Lane:
    """Of one device; its thread uses it, and whoever holds `queue.changed` may add to `own`.

    Args:
        queue: shared with the other devices.
        limit: how large the device's batches may be.
    """

    def __init__(self, queue: Queue, limit: BatchLimit) -> None:
        self.own: deque[list[Ticket]] = deque()
        """Batches that this device alone runs, before any other."""
        self.running: deque[Batch] = deque()
        """What the device was given and has not answered, the oldest first."""
        self._queue = queue
        self._limit = limit
        self._foresight = Foresight()
        self._freed = 0.0  # when the device was done with the last batch

    def ended(self, batch: Batch, ran: Ran) -> None:
        """The device has run a batch, which is no longer in `running`."""
        self._foresight.ran(batch.pixels, ran.freed - max(self._freed, ran.launched), ran.launched - batch.began)
        self._freed = ran.freed

    def died_with(self, batch: Batch) -> list[Ticket]:
        """The worker died with a batch and all that is in `running`: each picture is run again, alone, since one of
        them may be the cause.

        Returns:
            those that are not, since they took a worker with them before.
        """
        suspects = [ticket for one in (batch, *self.running) for ticket in one.tickets]
        self.running.clear()
        given_up = [ticket for ticket in suspects if ticket.failures]
        again = [ticket for ticket in suspects if not ticket.failures]
        for ticket in again:
            ticket.failures, ticket.alone = 1, True
        queue = self._queue
        with queue.changed:
            again += [ticket for tickets in self.own for ticket in tickets]
            self.own = deque([ticket] for ticket in again if ticket.warm_up)
            for ticket in again:
                if not ticket.warm_up:
                    queue.waiting.add(ticket)  # other devices may take them meanwhile
            queue.count()
            queue.changed.notify_all()
        return given_up

    def seconds(self, pixels: int) -> float:
        """What the device takes for a batch of so many padded pixels, at the best; 0 before the first batch."""
        # Not what this size took alone: one whose only run was slow, as the first of a shape is, is to be tried again.
        return min(self._queue.pace.seconds_for_pixels(pixels), self._expected_s(pixels))

    @property
    def has_own(self) -> bool:
        """Whether a batch for this device alone can begin now."""
        return bool(self.own) and not (self.running and self._must_end_first)

    @property
    def has_next(self) -> bool:
        """Whether something waits that can join what runs, and no other device for it."""
        waiting = self._queue.waiting
        return bool(waiting) and not waiting.alone and not self._queue.idle and not self._must_end_first

    @property
    def is_next_due(self) -> bool:
        """Whether the next batch is to be sent ahead: it is full, or what runs has ended or is about to."""
        is_due = self._queue.waiting.has_full(self._limit) or self.running[0].done.is_set()
        return self.has_next and (is_due or self.seconds_until_due <= 0)

    @property
    def seconds_until_due(self) -> float:
        """Sent earlier the next batch would be smaller than it need be; later, and the device would stand idle."""
        running = self.running[0]
        travel_s = self._foresight.travel_s
        started = max(running.began + travel_s, self._freed)  # when the device had it, and nothing else left to run
        return started + self._expected_s(running.pixels) - travel_s - time.monotonic()

    def _expected_s(self, pixels: int) -> float:
        takes = self._foresight.seconds(pixels)
        return self._queue.pace.seconds_for_pixels(pixels) if takes is None else takes

    @property
    def _must_end_first(self) -> bool:
        """Whether what runs, or what is next, is a picture that may end its process and must not take others along."""
        return self.running[0].tickets[0].alone or bool(self.own and self.own[0][0].alone)
