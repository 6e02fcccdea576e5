"""The thread that feeds one device: takes batches from the queue, answers their pictures, and deals with failures."""

import threading
import time
from functools import partial

import structlog

from dsg.service.devices import Device, DeviceLost, OutOfMemory, Ran, WorkerDied
from dsg.service.lane import Lane
from dsg.service.pace import BatchLimit
from dsg.service.shared_queue import Batch, DeadlinePassed, DeviceStopped, Queue, fail
from dsg.service.waiting import Outcome, Ticket

_log = structlog.get_logger("dsg.service")
_MOST_DEATHS = 3  # of a worker, one after the other without a batch between them that ran


class DeviceThread:
    """One device and the thread that feeds it.

    Args:
        device: only this thread begins batches on it.
        limit: how large its batches may be.
        queue: shared with the other devices' threads.
    """

    def __init__(self, device: Device, limit: BatchLimit, queue: Queue) -> None:
        self.device = device
        self.fault: str | None = None
        """Why this process must be restarted, or None."""
        self.up = True
        """Whether it takes batches now."""
        self._limit = limit
        self._queue = queue
        self._lane = Lane(queue, limit)
        self._deaths = 0
        self._death: WorkerDied | None = None  # of the worker that runs now
        device.when_died = self._hear_of_death
        self._thread = threading.Thread(target=self._work, name=f"dsg-device {device.name}", daemon=True)
        self._say_limit()
        queue.metrics.device_up.labels(device.name).set(1)
        queue.metrics.worker_deaths.labels(device.name)

    def start(self) -> None:
        """Start the thread; once."""
        self._queue.threads += 1
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the batches that run, at most so long."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def has_died(self) -> bool:
        """Whether the thread ended by a mistake of ours."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._queue.closed

    def run_own(self, tickets: list[Ticket]) -> None:
        """Have a batch run on this device and no other, before what waits."""
        with self._queue.changed:
            self._lane.own.append(tickets)
            self._queue.changed.notify_all()

    def _work(self) -> None:
        try:
            while self.fault is None and self._begin_batches():
                if self._lane.running:
                    self._end_batch(self._lane.running.popleft())
                elif self._death is not None:
                    self._revive(self._death)
        finally:
            self._go_down()

    def _begin_batches(self) -> bool:
        """Begin as many batches as the device takes, at least one while it lives; False when the queue is closed."""
        while len(self._lane.running) < self.device.ahead:
            tickets = self._next_batch()
            if tickets is None:
                return bool(self._lane.running) or not self._queue.closed
            now = time.monotonic()
            live = [ticket for ticket in tickets if self._claim(ticket, now)]
            if live:
                lowest = min(ticket.score_threshold for ticket in live)
                pictures = [ticket.picture for ticket in live]
                done = threading.Event()
                end = self.device.begin(live[0].model.number, pictures, lowest, partial(self._say_done, done))
                self._lane.running.append(Batch(live, now, end, done))
        return True

    def _say_done(self, done: threading.Event) -> None:
        with self._queue.changed:
            done.set()
            self._queue.changed.notify_all()

    def _hear_of_death(self, error: WorkerDied) -> None:
        with self._queue.changed:
            self._death = error
            self._queue.changed.notify_all()

    def _next_batch(self) -> list[Ticket] | None:
        """Wait until there is something to begin; None where there is none before the end of what runs, or of the
        device."""
        queue, lane = self._queue, self._lane
        with queue.changed:
            if lane.running:
                while not (queue.closed or self._death or lane.has_own or lane.is_next_due):
                    if lane.running[0].done.is_set():
                        return None
                    queue.changed.wait(lane.seconds_until_due if lane.has_next else None)
            else:
                queue.idle += 1
                queue.changed.wait_for(lambda: queue.closed or self._death or lane.own or queue.waiting)
                queue.idle -= 1
            if queue.closed or self._death:
                return None
            if lane.has_own:
                return lane.own.popleft()
            tickets = queue.waiting.take(self._limit, time.monotonic(), lane.seconds)
            queue.count()
            return tickets

    def _claim(self, ticket: Ticket, now: float) -> bool:
        """Whether a picture is still wanted; from here on it can no longer be cancelled."""
        if not ticket.future.running() and not ticket.future.set_running_or_notify_cancel():
            self._queue.metrics.dropped.labels("cancelled").inc()
            return False
        if now >= ticket.deadline:
            self._queue.metrics.dropped.labels("deadline").inc()
            ticket.future.set_exception(DeadlinePassed())
            return False
        return True

    def _end_batch(self, batch: Batch) -> None:
        try:
            ran = batch.end()
        except OutOfMemory as error:
            self._out_of_memory(batch, error)
        except DeviceLost as error:
            self._lost(batch, error)
        except WorkerDied as error:
            pictures = sum(len(one.tickets) for one in (batch, *self._lane.running))
            fail(self._lane.died_with(batch), error)
            self._revive(error, pictures)
        except Exception as error:
            self._failed(batch, error)
        else:
            self._answer(batch, ran)

    def _answer(self, batch: Batch, ran: Ran) -> None:
        metrics, name, size = self._queue.metrics, self.device.name, len(batch.tickets)
        self._deaths = 0
        self._lane.ended(batch, ran)
        for kind, count in ran.memory.items():
            metrics.gpu_memory.labels(name, kind).set(count)
        if not batch.tickets[0].warm_up:
            self._queue.pace.ran(size, batch.pixels, ran.seconds)
            self._limit.passed()
            self._say_limit()
            height, width = batch.tickets[0].picture.padded_size
            metrics.batch_size.observe(size)
            metrics.batch_pixels.observe(batch.pixels)
            metrics.batched_pictures.labels(f"{height}x{width}").inc(size)
            metrics.device_busy.labels(name).inc(ran.seconds)
        for ticket, detections in zip(batch.tickets, ran.detections, strict=True):
            ticket.future.set_result(Outcome(detections, batch.began - ticket.arrived, ran.seconds, size))

    def _failed(self, batch: Batch, error: Exception) -> None:
        """Run the halves of a batch whose network failed, so that only the picture at fault fails."""
        if len(batch.tickets) == 1:
            batch.tickets[0].future.set_exception(error)
            return
        _log.warning("batch failed, running its halves", pictures=len(batch.tickets), error=str(error)[:500])
        self._queue.metrics.batch_splits.labels("error").inc()
        self._halve(batch)

    def _out_of_memory(self, batch: Batch, error: OutOfMemory) -> None:
        """Run the halves, and smaller batches from now on; a single picture once more, since memory was freed."""
        ticket = batch.tickets[0]
        if len(batch.tickets) > 1:
            self._limit.out_of_memory(batch.pixels)
            self._say_limit()
            _log.warning("out of memory, running halves", pictures=len(batch.tickets), limit_pixels=self._limit.pixels)
            self._queue.metrics.batch_splits.labels("out_of_memory").inc()
            self._halve(batch)
        elif ticket.failures == 0:
            ticket.failures, ticket.alone = 1, True  # what runs beside takes memory too
            self._lane.own.appendleft([ticket])
        else:
            _log.error("out of memory for one picture", pixels=ticket.pixels, error=str(error)[:500])
            ticket.future.set_exception(error)

    def _halve(self, batch: Batch) -> None:
        middle = len(batch.tickets) // 2
        self._lane.own.extendleft((batch.tickets[middle:], batch.tickets[:middle]))

    def _lost(self, batch: Batch, error: DeviceLost) -> None:
        self.fault = "a device has failed and stays so until this process is restarted"
        _log.error("device lost", device=self.device.name, error=str(error)[:500])
        for ticket in batch.tickets:
            ticket.future.set_exception(error)

    def _revive(self, error: WorkerDied, pictures: int = 0) -> None:
        """Restart the worker. Where it dies over that, it is one more death in a row, and no picture's fault.

        Args:
            pictures: how many it died with.
        """
        self._say_up(False)
        if self._queue.closed:
            return  # whoever closes it ends the worker too
        self._deaths += 1
        self._queue.metrics.worker_deaths.labels(self.device.name).inc()
        _log.error("worker died", device=self.device.name, pictures=pictures, error=str(error))
        if self._deaths > _MOST_DEATHS:
            self.fault = "a worker died again and again"
            return
        self._death = None
        try:
            self.device.restart()
        except WorkerDied as again:
            self._revive(again)
        except (ValueError, TypeError, OSError, RuntimeError) as failure:
            _log.error("worker does not start", device=self.device.name, error=str(failure))
            self.fault = "a worker died and does not start again"
        else:
            self._say_up(True)

    def _go_down(self) -> None:
        """Fail what this device alone would have run, and what waits if it was the last."""
        self._say_up(False)
        error: Exception = DeviceStopped() if self.fault is None else DeviceLost(self.fault)
        tickets = [ticket for batch in self._lane.running for ticket in batch.tickets]
        queue = self._queue
        with queue.changed:
            tickets += [ticket for batch in self._lane.own for ticket in batch]
            self._lane.own.clear()
            queue.threads -= 1
            if queue.threads == 0:
                tickets += queue.waiting.take_all()
                queue.count()
        fail(tickets, error)

    def _say_up(self, up: bool) -> None:
        self.up = up
        self._queue.metrics.device_up.labels(self.device.name).set(up)

    def _say_limit(self) -> None:
        self._queue.metrics.batch_limit.labels(self.device.name).set(self._limit.pixels)
