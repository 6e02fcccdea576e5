"""One line an event on stderr: coloured for a person, JSON for a machine."""

import atexit
import logging
import os
import queue
import sys
import threading
import time

import structlog

_STDERR = 2
_MOST_LINES = 10_000  # that wait for a reader of stderr: a few megabytes
_END_S = 1.0  # what the reader has at the end to take them


def configure_log() -> "LogLines":
    """Have our events and the libraries' written in one way.

    Returns:
        where they go; whoever ends the process without Python's own end writes what waits there.
    """
    is_closed = sys.stderr is None
    pretty = not is_closed and sys.stderr.isatty()
    lines = LogLines(_nowhere() if is_closed else _STDERR)
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([] if pretty else [structlog.processors.format_exc_info]),
    ]
    # structlog's own traceback would show local variables: pixels by the million.
    pretty_lines = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer = pretty_lines if pretty else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*common, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(lines),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(lines)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(renderer, foreign_pre_chain=common))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # It warns of bytes that clients send; their answers say so, and anyone could fill the log with them.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    atexit.register(lines.end)
    return lines


class LogLines:
    """A stream that loses lines rather than requests: no full disk and no reader that has stopped may stop the service.

    A thread writes what is handed over here. Where it waits for its reader and as many lines wait for it as may, the
    next one is lost.

    Args:
        file: a descriptor. Not Python's stream of it, whose lock a thread that waits would hold for ever.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._is_cut = False  # whether the last line was written in part
        self._waiting: queue.Queue[bytes | threading.Event] = queue.Queue(_MOST_LINES)
        threading.Thread(target=self._work, name="dsg-log", daemon=True).start()

    def write(self, text: str) -> int:
        """Hand over a line, or what else is to be written at once."""
        try:
            self._waiting.put_nowait(text.encode(errors="backslashreplace"))
        except queue.Full:
            return 0
        return len(text)

    def flush(self) -> None:
        """Nothing: loggers ask for it after each line."""

    def end(self) -> None:
        """Wait until what was handed over is written, or its reader has not taken it in a second."""
        written = threading.Event()
        give_up = time.monotonic() + _END_S
        try:
            self._waiting.put(written, timeout=_END_S)
        except queue.Full:
            return
        written.wait(max(0.0, give_up - time.monotonic()))

    def _work(self) -> None:
        while True:
            line = self._waiting.get()
            if isinstance(line, threading.Event):
                line.set()
            else:
                self._write(line)

    def _write(self, line: bytes) -> None:
        rest = b"\n" + line if self._is_cut else line  # so that half a line spoils no whole one
        length = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self._is_cut = self._is_cut or len(rest) < length
        else:
            self._is_cut = False


def _nowhere() -> int:
    """A file that takes everything, also in place of stderr: its number must not become that of a connection."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    return file
