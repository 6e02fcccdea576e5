"""`dsg serve`: the HTTP service."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer


def serve(
    model: Annotated[str | None, typer.Option(help="Name or file of the model; else DSG_MODEL.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; else DSG_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; else DSG_PORT.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; else DSG_DEVICE.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="all GPUs ('all') or some ('cuda:0,cuda:1'), with one queue; else DSG_DEVICES.")
    ] = None,
    engine: Annotated[
        Literal["own", "ray"] | None, typer.Option(help="own: this process; ray: replicas behind Ray Serve.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto or HOST:6379; else Ray is started here.")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="Servers that Ray runs: a count, or least-most such as 1-8; else 1 to one a GPU.")
    ] = None,
) -> None:
    """Start the server. Every other setting is an environment variable DSG_*; the README lists them."""
    with _signals_end_it():
        from pydantic import ValidationError

        from dsg.service.run import serve as run_server
        from dsg.service.settings import Settings

        given: dict[str, Any] = {"model": model, "host": host, "port": port, "device": device, "devices": devices}
        given |= {"engine": engine, "ray_address": address, "replicas": replicas}
        try:
            settings = Settings(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            said = [(one["loc"], one["msg"].removeprefix("Value error, ")) for one in error.errors()]
            wrong = [f"DSG_{str(loc[0]).upper()}: {message}" if loc else message for loc, message in said]
            raise ValueError(f"wrong setting, {'; '.join(wrong)}") from None
        before = threading.enumerate()
        run_server(settings)
        if any(thread not in before for thread in threading.enumerate()):
            _end()


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Have a signal end the process with 0 while there is nothing to finish: before the server handles it, and after.

    The first process of a container would not hear it otherwise. A server that was told to outlive its terminal
    (`nohup`) does.
    """
    numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    handlers = {number: signal.getsignal(number) for number in numbers}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(0))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end() -> None:
    """End the process at once, with threads in the middle of what was given up: Python would wait for some, and unwind
    others where torch's own code returns to them, which aborts the process."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(0)
