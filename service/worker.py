"""A process that owns one device: reads batches from a socket, runs them, writes what was found.

Started by `dsg.service.worker_device` as `python -m dsg.service.worker MESSAGES PICTURES`, two descriptors of
sockets. It ends when the other side does, however that ends.
"""

import contextlib
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from dsg.service.devices import DeviceLost, LocalDevice, OutOfMemory, Ran
from dsg.service.shared_pixels import open_shared

if TYPE_CHECKING:
    from dsg.model.network.detections import Detections

_FAILURES = {OutOfMemory: "memory", DeviceLost: "lost", ValueError: "value", OSError: "value", TypeError: "value"}
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
    _Worker(connection, pictures, LocalDevice(name, load)).work()


class _Worker:
    def __init__(self, connection: Connection, pictures: socket.socket, device: LocalDevice) -> None:
        self._connection = connection
        self._pictures = pictures
        self._device = device
        self._is_cuda = device.name.startswith("cuda")
        self._sending = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            self._tasks.get()()

    def _read(self) -> None:
        """Take messages; while a batch runs, the pixels of the next are brought to where the device copies fast."""
        try:
            while True:
                number, kind, *given = pickle.loads(self._connection.recv_bytes())
                if kind == "load":
                    # Beside the batches, so that a reload holds nothing up.
                    threading.Thread(target=self._answer, args=(number, self._load, *given), daemon=True).start()
                elif kind == "forget":
                    self._tasks.put(partial(self._device.forget, *given))
                else:
                    model, pictures, threshold = given
                    prepared = self._with_pixels(pictures)
                    self._tasks.put(partial(self._answer, number, self._detect, model, prepared, threshold))
        except (EOFError, OSError):
            os._exit(0)  # the server is gone, and a batch that still runs has no reader
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the server notices, and starts another

    def _with_pixels(self, pictures: list[tuple[Any, Any]]) -> list[Any]:
        files: list[int] = []
        while len(files) < len(pictures):
            _, more, _, _ = socket.recv_fds(self._pictures, 1, MOST_FILES)
            if not more:
                raise EOFError
            files += more
        prepared = []
        for file, (picture, layout) in zip(files, pictures, strict=True):
            pixels = open_shared(file, layout)
            if self._is_cuda and layout.is_tensor:
                with contextlib.suppress(RuntimeError):  # a lost device says so when the batch runs
                    pixels = pixels.pin_memory()
            prepared.append(replace(picture, pixels=pixels))
        return prepared

    def _load(self, model: int, source: str) -> str:
        predictor = self._device.load(model, source)
        assert predictor is not None
        return predictor.info.hash

    def _detect(self, model: int, prepared: list[Any], threshold: float) -> tuple[list[Any], float, dict[str, int]]:
        ran = self._device.begin(model, prepared, threshold)()
        return [pack(one) for one in ran.detections], ran.seconds, ran.memory

    def _answer(self, number: int, task: Callable[..., Any], *given: Any) -> None:
        """Run a task and send what it gives: before the next one begins, which may be the end of this process."""
        try:
            answer = (number, "done", task(*given))
        except Exception as error:
            kind = next((word for known, word in _FAILURES.items() if isinstance(error, known)), "error")
            text = str(error)
            if kind == "error":  # for the log: its traceback is on this side
                text = "\n".join((f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])))
            answer = (number, kind, text)
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


def pack(detections: "Detections") -> tuple[type, dict[str, Any]]:
    """Detections as plain arrays: torch's own way to pickle tensors is many times slower for small ones."""
    values = {one.name: getattr(detections, one.name) for one in fields(detections)}
    return type(detections), {name: v.numpy() if hasattr(v, "numpy") else v for name, v in values.items()}


def ran_of(answer: tuple[list[Any], float, dict[str, int]]) -> Ran:
    """A worker's answer to a batch; its detections hold arrays, which are quicker to write answers from."""
    packed, seconds, memory = answer
    return Ran([kind(**values) for kind, values in packed], seconds, memory)


if __name__ == "__main__":
    main()
