"""Pictures of many requests -> batches on one device, answered each on its own.

Pictures wait in buckets of one model and one padded shape, because only those can run together. One thread
owns the device. It takes a batch as soon as it is free: an idle device starts at once with what is there, and
while it is busy, what arrives meanwhile collects. There is no waiting time to tune. The bucket whose first
picture has waited longest goes first, so that a rare shape is never starved by a common one.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import structlog

from dsg.service.metrics import Metrics

if TYPE_CHECKING:
    from dsg.model.network.detections import Detections
    from dsg.model.network.predictor import Predictor, PreparedImage

_log = structlog.get_logger("dsg.service")
_RATE_MEMORY = 0.8  # weight of the past in the running mean of seconds per picture


class DeadlinePassed(Exception):
    """A picture's deadline passed before the device came to it."""


class DeviceStopped(Exception):
    """The batcher was closed before the device came to a picture."""


@dataclass(frozen=True)
class Outcome:
    """What the device made of one picture."""

    detections: "Detections"
    queue_s: float
    """Time it waited for the device, seconds."""
    infer_s: float
    """Time its batch took on the device, seconds."""
    batch_size: int
    """Pictures that ran together, this one included."""


@dataclass(frozen=True, eq=False)
class _Job:
    predictor: "Predictor"
    picture: "PreparedImage"
    deadline: float
    score_threshold: float
    future: "Future[Outcome]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def bucket(self) -> tuple[int, tuple[int, int]]:
        # By identity: after a reload, pictures for the old and the new model of one name run apart.
        return id(self.predictor), self.picture.padded_size


class Batcher:
    """Queue and device thread.

    Args:
        max_batch: most pictures in one batch.
        metrics: told of every batch and every dropped picture.
    """

    def __init__(self, max_batch: int, metrics: Metrics) -> None:
        self._max_batch = max_batch
        self._metrics = metrics
        self._changed = threading.Condition()
        self._buckets: dict[tuple[int, tuple[int, int]], deque[_Job]] = {}
        self._closed = False
        self._seconds_per_picture = 0.0
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._work, name="dsg-device", daemon=True)

    def start(self) -> None:
        """Start the device thread; once."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Fail what still waits with `DeviceStopped`; wait for the batch that runs, at most `timeout_s`."""
        with self._changed:
            self._closed = True
            waiting = [job for jobs in self._buckets.values() for job in jobs]
            self._buckets.clear()
            self._count_waiting()
            self._changed.notify()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(DeviceStopped())
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def submit(
        self,
        predictor: "Predictor",
        pictures: Sequence["PreparedImage"],
        deadline: float,
        score_threshold: float = 0.0,
    ) -> "list[Future[Outcome]]":
        """Queue the pictures of one request, together, so that an idle device sees all of them.

        Args:
            predictor: whose `detect` runs them.
            pictures: from its `prepare`.
            deadline: on the clock of `time.monotonic`; a picture that the device has not come to by then is
            dropped.
            score_threshold: detections that score less are of no use to the request, and may be missing.

        Returns:
            a future for each picture. It fails with `DeadlinePassed`, `DeviceStopped` or what `detect` raised
            for this picture. Cancelling it takes the picture out of the queue.
        """
        jobs = [_Job(predictor, picture, deadline, score_threshold) for picture in pictures]
        with self._changed:
            if self._closed:
                raise DeviceStopped
            for job in jobs:
                self._buckets.setdefault(job.bucket, deque()).append(job)
            self._count_waiting()
            self._changed.notify()
        for job in jobs:
            # Not left until its turn: clients that hang up by the hundred must not fill the memory.
            job.future.add_done_callback(partial(self._forget, job))
        return [job.future for job in jobs]

    def seconds_per_picture(self) -> float:
        """Running mean of what the device takes for one picture, in seconds; 0 before the first batch."""
        return self._seconds_per_picture

    @property
    def fault(self) -> str | None:
        """Why this process can no longer use its device and must be restarted, or None."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._closed:
            return "the device thread has died"
        return self._fault

    def _forget(self, job: _Job, future: "Future[Outcome]") -> None:
        if not future.cancelled():
            return
        with self._changed:
            jobs = self._buckets.get(job.bucket)
            if jobs is None or job not in jobs:
                return
            jobs.remove(job)
            if not jobs:
                del self._buckets[job.bucket]
            self._count_waiting()
        self._metrics.dropped.labels("cancelled").inc()

    def _count_waiting(self) -> None:
        self._metrics.queued.set(sum(map(len, self._buckets.values())))

    def _work(self) -> None:
        while (jobs := self._next_batch()) is not None:
            started = time.monotonic()
            live = [job for job in jobs if self._claim(job, started)]
            if not live:
                continue
            self._run(live)
            per_picture = (time.monotonic() - started) / len(live)
            past = self._seconds_per_picture or per_picture
            self._seconds_per_picture = _RATE_MEMORY * past + (1 - _RATE_MEMORY) * per_picture

    def _next_batch(self) -> list[_Job] | None:
        """Wait for work; None when the batcher is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._buckets)
            if self._closed:
                return None
            bucket = min(self._buckets, key=lambda key: self._buckets[key][0].arrived)
            waiting = self._buckets[bucket]
            jobs = [waiting.popleft() for _ in range(min(len(waiting), self._max_batch))]
            if not waiting:
                del self._buckets[bucket]
            self._count_waiting()
            return jobs

    def _claim(self, job: _Job, now: float) -> bool:
        """Whether a job is still wanted; from here on it can no longer be cancelled."""
        if not job.future.set_running_or_notify_cancel():
            self._metrics.dropped.labels("cancelled").inc()
            return False
        if now >= job.deadline:
            self._metrics.dropped.labels("deadline").inc()
            job.future.set_exception(DeadlinePassed())
            return False
        return True

    def _run(self, jobs: list[_Job]) -> None:
        """Run a batch; where it fails, run its halves, so that only the picture at fault fails."""
        started = time.monotonic()
        try:
            lowest = min(job.score_threshold for job in jobs)
            answers = jobs[0].predictor.detect([job.picture for job in jobs], lowest)
            if len(answers) != len(jobs):
                raise RuntimeError(f"detect gave {len(answers)} answers for {len(jobs)} pictures")
        except Exception as error:
            failure = error
        else:
            self._answer(jobs, answers, started)
            return
        if _device_is_lost(failure):
            self._fault = "the device has failed and stays so until this process is restarted"
            _log.error("device lost", error=str(failure))
        if len(jobs) == 1 or self._fault is not None:
            for job in jobs:
                job.future.set_exception(failure)
            return
        # The traceback holds the batch's tensors; the halves need their memory.
        failure.__traceback__ = None
        _log.warning("batch failed, running its halves", pictures=len(jobs), error=str(failure))
        self._metrics.batch_splits.inc()
        middle = len(jobs) // 2
        self._run(jobs[:middle])
        self._run(jobs[middle:])

    def _answer(self, jobs: list[_Job], answers: "Sequence[Detections]", started: float) -> None:
        infer_s = time.monotonic() - started
        self._metrics.batch_size.observe(len(jobs))
        height, width = jobs[0].picture.padded_size
        self._metrics.batched_pictures.labels(f"{height}x{width}").inc(len(jobs))
        for job, detections in zip(jobs, answers, strict=True):
            job.future.set_result(Outcome(detections, started - job.arrived, infer_s, len(jobs)))


def _device_is_lost(error: Exception) -> bool:
    """Whether CUDA's context is broken for good; running out of memory is not that."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
