"""Pictures of many requests -> batches on one or more devices, answered each on its own.

One queue for all devices (`dsg.service.waiting` says which pictures go next), one thread for each device
(`dsg.service.device_thread`). A device takes a batch as soon as it is free: an idle one starts at once with what is
there, and while all are busy, what arrives meanwhile collects. There is no waiting time to tune.
"""

import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from dsg.service.device_thread import DeviceThread
from dsg.service.devices import Device, DeviceLost, OutOfMemory, WorkerDied
from dsg.service.metrics import Metrics
from dsg.service.pace import BatchLimit
from dsg.service.shared_queue import DeadlinePassed, DeviceStopped, Queue, fail, forget_when_cancelled
from dsg.service.waiting import Outcome, Ticket, WaitingPictures

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage
    from dsg.service.models import ServedModel

__all__ = ["Batcher", "DeadlinePassed", "DeviceLost", "DeviceStopped", "OutOfMemory", "Outcome", "WorkerDied"]


class Batcher:
    """One queue and the threads of its devices.

    Args:
        devices: what runs the batches.
        max_batch: most pictures in a batch.
        max_batch_pixels: most padded pixels in a batch of several pictures.
        ageing_s: seconds of waiting that count as much as a full batch.
        metrics: told of every batch and every dropped picture.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        max_batch: int,
        max_batch_pixels: int,
        ageing_s: float,
        metrics: Metrics,
    ) -> None:
        self._queue = Queue(WaitingPictures(ageing_s), metrics)
        self._threads = [
            DeviceThread(device, BatchLimit(max_batch, max_batch_pixels, device.name.startswith("cuda")), self._queue)
            for device in devices
        ]

    def start(self) -> None:
        """Start the devices' threads; once."""
        for thread in self._threads:
            thread.start()

    def close(self, timeout_s: float) -> None:
        """Fail what still waits with `DeviceStopped`; wait for the batches that run, at most `timeout_s`."""
        queue = self._queue
        with queue.changed:
            queue.closed = True
            waiting = queue.waiting.take_all()
            queue.count()
            queue.changed.notify_all()
        fail(waiting, DeviceStopped())
        give_up = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))

    def submit(
        self,
        model: "ServedModel",
        pictures: "Sequence[PreparedImage]",
        deadline: float,
        score_threshold: float = 0.0,
    ) -> "list[Future[Outcome]]":
        """Queue the pictures of one request, together, so that an idle device sees all of them.

        Args:
            model: what runs them.
            pictures: as it prepared them.
            deadline: on the clock of `time.monotonic`; a picture that no device has come to by then is dropped.
            score_threshold: detections that score less are of no use to the request, and may be missing.

        Returns:
            a future for each picture. It fails with `DeadlinePassed`, `DeviceStopped`, `DeviceLost`, `OutOfMemory`,
            `WorkerDied` or what the network raised for this picture. Cancelling it takes the picture out of the
            queue.
        """
        queue = self._queue
        with queue.changed:
            now, request = time.monotonic(), object()
            tickets = [
                Ticket(model, picture, deadline, score_threshold, turn=now + begins_s, request=request)
                for picture, begins_s in zip(pictures, self._turns(pictures), strict=False)
            ]
            if queue.closed:
                raise DeviceStopped
            if self.fault is not None and not any(thread.up for thread in self._threads):
                raise DeviceLost(self.fault)
            for ticket in tickets:
                queue.waiting.add(ticket)
            queue.count()
            queue.changed.notify_all()
        for ticket in tickets:
            forget_when_cancelled(queue, ticket)
        return [ticket.future for ticket in tickets]

    def warm(self, model: "ServedModel", batches: "Sequence[Sequence[PreparedImage]]") -> "list[Future[Outcome]]":
        """Run batches on every device, before what waits, so that no client waits for a network's first runs."""
        futures = []
        for thread in self._threads:
            for batch in batches:
                tickets = [Ticket(model, picture, math.inf, 0.0, warm_up=True) for picture in batch]
                thread.run_own(tickets)
                futures += [ticket.future for ticket in tickets]
        return futures

    def seconds_until_free(self, pictures: int) -> float:
        """About how long until the devices are done with so many more pictures; 0 before the first batch."""
        return self._queue.pace.seconds_for_pictures(pictures) / self._devices_up

    def seconds_of_queue(self) -> float:
        """About how long the devices need for all whose turn is before that of one that comes now; 0 before the first
        batch."""
        queue = self._queue
        with queue.changed:
            pixels = queue.waiting.pixels_before(time.monotonic())
        return queue.pace.seconds_for_pixels(pixels) / self._devices_up

    def seconds_of_request(self, pictures: "Sequence[PreparedImage]") -> float:
        """About how long it takes until the turns of all pictures of a request have passed; 0 for a picture that is
        alone, where nothing waits, and before the first batch."""
        if len(pictures) == 1:
            return 0.0  # as nearly all are, which need no lock
        with self._queue.changed:
            return self._turns(pictures)[-1] if self._queue.waiting else 0.0

    def _turns(self, pictures: "Sequence[PreparedImage]") -> list[float]:
        """Seconds from now until the turn of each picture of a request begins, and until the last one ends: those of a
        request come one by one, and those of all requests in turn. Whoever asks holds `queue.changed`."""
        share = (1 + self._queue.waiting.requests) / self._devices_up if len(pictures) > 1 else 0.0
        seconds = (share * self._queue.pace.seconds_for_pixels(math.prod(one.padded_size)) for one in pictures)
        return list(itertools.accumulate(seconds, initial=0.0))

    @property
    def is_up(self) -> bool:
        """Whether any device takes batches now."""
        return any(thread.up for thread in self._threads)

    @property
    def fault(self) -> str | None:
        """Why this process must be restarted, or None."""
        for thread in self._threads:
            if thread.fault is not None:
                return thread.fault
            if thread.has_died:
                return "a device's thread has died"
        return None

    @property
    def _devices_up(self) -> int:
        return max(1, sum(thread.up for thread in self._threads))
