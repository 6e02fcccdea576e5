"""A device in a process of its own, as the server sees it (`dsg.service.worker` is the other side)."""

import itertools
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import structlog

from dsg.service.devices import DeviceLost, LoadPredictor, OutOfMemory, Ran, WorkerDied
from dsg.service.shared_pixels import Segment, SharedPixels, share
from dsg.service.worker import MOST_FILES

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage

_FAILURES: dict[str, type[Exception]] = {
    "memory": OutOfMemory,
    "lost": DeviceLost,
    "value": ValueError,
    "error": RuntimeError,
}
_CLOSE_S = 2.0
_KILLED_S = 30.0  # a driver that is stuck may keep a killed process for ever
# A batch without an answer for so long hangs. The first run of a shape on a cold GPU may take 90 s; loading a model has
# no bound, since that depends on its file and its disk.
_BATCH_S = 180.0
_log = structlog.get_logger("dsg.service")


@dataclass
class _Asked:
    """What a worker was asked and has not answered."""

    answer: Future[Any]
    pixels: Sequence[SharedPixels]
    """Of a batch, kept from being written over before it is answered; none of a load."""
    since: float
    """On the clock of `time.monotonic`."""


class WorkerDevice:
    """A process for one device.

    Args:
        name: torch's name of the device.
        load: makes predictors there; a function that can be imported.
        threads: of torch in that process; 0 leaves them as they are.
    """

    ahead = 2  # the pixels of the second batch travel while the first one runs

    def __init__(self, name: str, load: LoadPredictor, threads: int = 0) -> None:
        self.name = name
        self._load = load
        self._threads = threads
        self._models: dict[int, tuple[str, str]] = {}  # number -> source, hash
        self._sending = threading.Lock()
        self.when_died: Callable[[WorkerDied], None] = lambda error: None

    @property
    def process_id(self) -> int:
        """Of the worker that runs now."""
        return self._process.pid

    def load(self, model: int, source: str) -> None:
        digest = self._call("load", model, source).result()
        self._models[model] = source, digest

    def begin(
        self,
        model: int,
        pictures: "Sequence[PreparedImage]",
        score_threshold: float,
        when_done: Callable[[], None] = lambda: None,
    ) -> Callable[[], Ran]:
        no_pixels: Any = None  # they travel on their own
        shared: list[Any] = [one.pixels for one in pictures]  # `share` has put `SharedPixels` there
        described = [
            (replace(one, pixels=no_pixels), pixels.segment.number, pixels.layout)
            for one, pixels in zip(pictures, shared, strict=True)
        ]
        new, gone = self._segments_to_tell(shared)
        numbers = [segment.number for segment in new]
        future = self._call("detect", model, described, score_threshold, numbers, gone, new=new, read=shared)
        future.add_done_callback(lambda _: when_done())
        return future.result

    def _segments_to_tell(self, pictures: Sequence[SharedPixels]) -> tuple[list[Segment], list[int]]:
        """Segments that the worker has not seen yet, and the numbers of those that it need keep no longer."""
        gone = [number for number, segment in self._told.items() if segment() is None]
        for number in gone:
            del self._told[number]
        segments = {one.segment.number: one.segment for one in pictures}
        new = [segment for number, segment in segments.items() if number not in self._told]
        self._told.update((segment.number, weakref.ref(segment)) for segment in new)
        return new, gone

    def share(self, picture: "PreparedImage") -> "PreparedImage":
        return share(picture)

    def forget(self, model: int) -> None:
        self._models.pop(model, None)
        self._call("forget", model, answered=False)

    def restart(self) -> None:
        self.close()
        self.start()
        for model, (source, digest) in list(self._models.items()):
            if self._call("load", model, source).result() != digest:
                raise ValueError("the file of a model has changed since it was loaded")

    def close(self) -> None:
        with suppress(OSError):
            self._pictures.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._messages.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        with self._sending:
            self._connection.close()
            self._messages.close()
            self._pictures.close()

    def start(self) -> None:
        messages, child_messages = socket.socketpair()
        pictures, child_pictures = socket.socketpair()
        with child_messages, child_pictures:
            files = child_messages.fileno(), child_pictures.fileno()
            command = [sys.executable, "-m", "dsg.service.worker", *map(str, files)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=files)
        # One that stops in the middle of an answer keeps its reader no longer than one that stops before it.
        messages.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(_BATCH_S), 0))
        with self._sending:  # other threads may load or forget a model meanwhile
            self._messages, self._pictures = messages, pictures
            self._connection = Connection(os.dup(messages.fileno()))
            self._numbers = itertools.count()
            self._told: dict[int, weakref.ref[Segment]] = {}  # segments by number
            self._asked: dict[int, _Asked] = {}
            self._ended = ""  # how; nothing while it runs
            with suppress(OSError):  # one that died at its start is noticed by its reader
                self._connection.send_bytes(pickle.dumps(sys.path))
                self._connection.send_bytes(pickle.dumps((self.name, self._load, self._threads)))
        self._reader = threading.Thread(target=self._read, name=f"dsg-worker {self.name}", daemon=True)
        self._reader.start()

    def _call(
        self,
        kind: str,
        *given: Any,
        new: Sequence[Segment] = (),
        read: Sequence[SharedPixels] = (),
        answered: bool = True,
    ) -> Future[Any]:
        """Send a message; the future has its answer, or `WorkerDied`.

        Args:
            new: segments whose descriptors go with it.
            read: pixels that nothing else may be written over before it is answered.
        """
        future: Future[Any] = Future()
        with self._sending:
            number, ended = next(self._numbers), self._ended
            if answered and not ended:
                self._asked[number] = _Asked(future, read, time.monotonic())
            try:
                self._connection.send_bytes(pickle.dumps((number, kind, *given), pickle.HIGHEST_PROTOCOL))
                files = [segment.file for segment in new]
                for first in range(0, len(files), MOST_FILES):
                    socket.send_fds(self._pictures, [b"x"], files[first : first + MOST_FILES])
            except OSError:
                with suppress(OSError):
                    self._messages.shutdown(socket.SHUT_RDWR)  # its reader deals with the rest
        if ended:
            future.set_exception(WorkerDied(ended))
        return future

    def _read(self) -> None:
        """Take answers until the worker ends, and see that it does where it hangs."""
        process = self._process
        arrived = select.poll()
        arrived.register(self._connection, select.POLLIN)
        try:
            while True:
                number, kind, answer = self._receive(arrived)
                future = self._asked.pop(number).answer
                if kind == "done":
                    future.set_result(answer)
                else:
                    future.set_exception(_FAILURES[kind](answer))
        except (EOFError, OSError):
            try:
                process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_KILLED_S)
        ended = f"the worker of {self.name} ended with status {process.poll()}"
        self.when_died(WorkerDied(ended))
        with self._sending:
            self._ended = ended
            asked, self._asked = self._asked, {}
        for one in asked.values():
            one.answer.set_exception(WorkerDied(ended))

    def _receive(self, arrived: select.poll) -> Any:
        """The next answer; kills a worker that gives none to a batch."""
        heard = time.monotonic()  # the batch behind the one that was answered then has run since
        left = _BATCH_S
        while not arrived.poll(1000 * left):
            now = time.monotonic()
            batches = [one.since for one in list(self._asked.values()) if one.pixels]
            left = max(heard, min(batches, default=now)) + _BATCH_S - now
            if left <= 0:
                _log.error("worker hangs, killing it", device=self.name, seconds=_BATCH_S)
                self._process.kill()
                raise EOFError
        return pickle.loads(self._connection.recv_bytes())
