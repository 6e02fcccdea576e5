"""A device in a process of its own, as the server sees it (`dsg.service.worker` is the other side)."""

import itertools
import os
import pickle
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

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
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
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
        self._messages, self._pictures = messages, pictures
        self._connection = Connection(os.dup(messages.fileno()))
        self._numbers = itertools.count()
        self._told: dict[int, weakref.ref[Segment]] = {}  # segments by number
        self._asked: dict[int, tuple[Future[Any], Sequence[SharedPixels]]] = {}
        self._sending = threading.Lock()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name=f"dsg-worker {self.name}", daemon=True)
        self._reader.start()
        with suppress(OSError):  # one that died at its start is noticed by its reader
            self._connection.send_bytes(pickle.dumps(sys.path))
            self._connection.send_bytes(pickle.dumps((self.name, self._load, self._threads)))

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
            number = next(self._numbers)
            if answered:
                self._asked[number] = future, read
            try:
                self._connection.send_bytes(pickle.dumps((number, kind, *given), pickle.HIGHEST_PROTOCOL))
                files = [segment.file for segment in new]
                for first in range(0, len(files), MOST_FILES):
                    socket.send_fds(self._pictures, [b"x"], files[first : first + MOST_FILES])
            except OSError:
                self._ended = True
            ended = self._ended
        if ended:
            self._fail_all()
        return future

    def _read(self) -> None:
        connection, process = self._connection, self._process
        try:
            while True:
                number, kind, answer = pickle.loads(connection.recv_bytes())
                future = self._asked.pop(number)[0]
                if kind == "done":
                    future.set_result(answer)
                else:
                    future.set_exception(_FAILURES[kind](answer))
        except (EOFError, OSError):
            with self._sending:
                self._ended = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_S)
            self._fail_all()

    def _fail_all(self) -> None:
        with self._sending:
            asked, self._asked = self._asked, {}
        status = self._process.poll()
        for future, _ in asked.values():
            future.set_exception(WorkerDied(f"the worker of {self.name} ended with status {status}"))
