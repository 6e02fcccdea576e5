"""One line an event on stderr: coloured for a person, JSON for a machine."""

import logging
import sys
from typing import TextIO

import structlog


def configure_log() -> None:
    """Have our events and the libraries' written in one way."""
    pretty = sys.stderr.isatty()
    stream = _Unfailing(sys.stderr)
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
        logger_factory=structlog.WriteLoggerFactory(stream),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(renderer, foreign_pre_chain=common))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # It warns of bytes that clients send; their answers say so, and anyone could fill the log with them.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


class _Unfailing:
    """A stream that loses lines rather than requests: a disk that is full must not stop the service."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: closed
            return 0

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return
