"""A process that owns one device: reads batches from a socket, runs them, writes what was found.

Started by `dsg.service.worker_device` as `python -m dsg.service.worker MESSAGES PICTURES`, two descriptors of
sockets. It ends when the other side does, however that ends.
"""

import contextlib
import gc
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from dsg.service.devices import DeviceLost, OutOfMemory
from dsg.service.local_device import LocalDevice, Running
from dsg.service.shared_pixels import Layout, OpenSegments

if TYPE_CHECKING:
    from dsg.model.network.detections import Detections

_FAILURES = {OutOfMemory: "memory", DeviceLost: "lost", ValueError: "value", OSError: "value", TypeError: "value"}
_MOST_RUNNING = 2
_LOOK_S = 0.0003  # how often it looks whether a batch is done, while it waits for the next
MOST_FILES = 250  # the kernel sends no more descriptors in one message


def main() -> None:
    """Serve until the other side hangs up."""
    # Whoever stops the server tells the server, and it lets this process finish what it runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection, pictures = Connection(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    sys.path[:] = pickle.loads(connection.recv_bytes())
    name, load, threads = pickle.loads(connection.recv_bytes())
    if threads:
        import torch

        torch.set_num_threads(threads)
    worker = Worker(connection, pictures, LocalDevice(name, load))
    threading.Thread(target=worker.read, daemon=True).start()
    worker.work()


@dataclass
class Asked:
    """A batch as it was asked for."""

    number: int
    model: int
    pictures: list[Any]
    threshold: float


class Worker:
    """Runs what is asked for on one device: two batches at a time, of which the second waits in the device's own queue.

    Args:
        connection: answers go there, and what is asked for comes from there.
        pictures: descriptors of pixels come from there.
        device: no one else runs batches on it.
    """

    def __init__(self, connection: Connection, pictures: socket.socket, device: LocalDevice) -> None:
        self._connection = connection
        self._pictures = pictures
        self._device = device
        self._segments = OpenSegments(device.name)
        self._sending = threading.Lock()
        self._asked: queue.SimpleQueue[Asked | Callable[[], None]] = queue.SimpleQueue()
        self._running: deque[tuple[int, Running]] = deque()
        self._ended = 0.0  # when the last batch did, on the clock of time.monotonic

    def work(self) -> None:
        """Run batches for ever."""
        while True:
            can_take = len(self._running) < _MOST_RUNNING
            if not self._running or (can_take and not self._asked.empty()):
                self._next(None)  # behind the one that runs, before what that one found is looked at
            elif not can_take or self._running[0][1].is_done():
                self._end(*self._running.popleft())
            else:
                self._next(_LOOK_S)

    def _next(self, timeout_s: float | None) -> None:
        """Begin what is asked for next; wait for it at most so long."""
        try:
            asked = self._asked.get(timeout=timeout_s)
        except queue.Empty:
            return
        if not isinstance(asked, Asked):
            asked()
            return
        with self._failures_told(asked.number):
            running = self._device.launch(asked.model, asked.pictures, asked.threshold)
            self._running.append((asked.number, running))

    def _end(self, number: int, running: Running) -> None:
        with self._failures_told(number):
            ran = running.end(self._ended, self._device.is_memory_due())
            self._tell(number, "done", replace(ran, detections=list(map(pack, ran.detections))))
        self._ended = time.monotonic()

    def ask(self, asked: Asked) -> None:
        """Have a batch run."""
        self._asked.put(asked)

    def read(self) -> None:
        """Take messages, and end this process when the other side ends."""
        try:
            while True:
                number, kind, *given = pickle.loads(self._connection.recv_bytes())
                if kind == "load":
                    # Beside the batches, so that a reload holds nothing up.
                    threading.Thread(target=self._load, args=(number, *given), daemon=True).start()
                elif kind == "forget":
                    self._asked.put(partial(self._forget, *given))
                else:
                    model, pictures, threshold, new, gone = given
                    self._segments.forget(gone)
                    self._map(new)
                    self.ask(Asked(number, model, self._with_pixels(pictures), threshold))
        except (EOFError, OSError):
            os._exit(0)  # the server is gone, and a batch that still runs has no reader
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the server notices, and starts another

    def _map(self, numbers: list[int]) -> None:
        """Map segments whose descriptors are on their way."""
        files: list[int] = []
        while len(files) < len(numbers):
            _, more, _, _ = socket.recv_fds(self._pictures, 1, MOST_FILES)
            if not more:
                raise EOFError
            files += more
        for number, file in zip(numbers, files, strict=True):
            self._segments.add(number, file)

    def _with_pixels(self, pictures: list[tuple[Any, int, Layout]]) -> list[Any]:
        return [replace(one, pixels=self._segments.pixels(number, layout)) for one, number, layout in pictures]

    def _load(self, number: int, model: int, source: str) -> None:
        with self._failures_told(number):
            predictor = self._device.load(model, source)
            assert predictor is not None
            # Python would look through all of torch for rings of objects now and then, while every batch waits.
            gc.freeze()
            self._tell(number, "done", predictor.info.hash)

    def _forget(self, model: int) -> None:
        self._device.forget(model)
        gc.unfreeze()
        gc.collect()  # once, so that a ring does not keep a model's memory for ever
        gc.freeze()

    @contextlib.contextmanager
    def _failures_told(self, number: int) -> Iterator[None]:
        """Answer a question with the error that it ends in, if it does."""
        try:
            yield
        except Exception as error:
            kind = next((word for known, word in _FAILURES.items() if isinstance(error, known)), "error")
            text = str(error)
            if kind == "error":  # for the log: its traceback is on this side
                text = "\n".join((f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])))
            self._tell(number, kind, text)

    def _tell(self, number: int, kind: str, answer: Any) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(pickle.dumps((number, kind, answer), pickle.HIGHEST_PROTOCOL))


def pack(detections: "Detections") -> "Detections":
    """Detections of plain arrays: torch's own way to pickle tensors is many times slower for small ones, and answers
    are quicker to write from arrays too."""
    tensors = {one.name: getattr(detections, one.name) for one in fields(detections)}
    return replace(detections, **{name: v.numpy() for name, v in tensors.items() if hasattr(v, "numpy")})


if __name__ == "__main__":
    main()
