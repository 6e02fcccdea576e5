"""One server process: a port, a log, the application, and an orderly end."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from dsg.service.app import create_app
from dsg.service.decode import guard_decoding
from dsg.service.devices import LoadPredictor
from dsg.service.listen import ServiceError, listen
from dsg.service.logs import configure_log
from dsg.service.models import kernel_in_use
from dsg.service.process import allow_many_files, one_core_a_thread
from dsg.service.protocol import bounded_protocol
from dsg.service.settings import Settings
from dsg.service.state import Service

_log = structlog.get_logger("dsg.service")
_BACKLOG = 2048
_HANG_UP = getattr(signal, "SIGHUP", None)  # not made for Windows


def serve(settings: Settings, load_predictor: LoadPredictor | None = None) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; then finish what is in flight, within `settings.drain_ms`, and return.

    A second signal ends it at once. A thread that is still at something that was given up may outlive this call.

    Raises:
        ServiceError: the port is taken, a model does not load, or there is no Ray where its engine is asked for.
    """
    lines = configure_log()
    try:
        _check_ops()
        if settings.engine == "ray":
            from dsg.service.ray_engine import serve_on_ray

            serve_on_ray(settings, load_predictor)
        else:
            _serve_here(settings, load_predictor)
    finally:
        lines.end()


def _check_ops() -> None:
    """Raise for a word that the op does not know: it would run as if there were none."""
    asked = os.environ.get("DSG_OPS") or "reference"
    if asked != "reference":
        raise ServiceError(f"DSG_OPS is {asked!r}; set reference, or leave it out")


def _serve_here(settings: Settings, load_predictor: LoadPredictor | None) -> None:
    guard_decoding()
    allow_many_files()
    listener = listen(settings.host, settings.port)
    try:
        try:
            app = create_app(settings, load_predictor)
        except ValueError as error:
            raise ServiceError(str(error)) from error
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(app, listener))
    finally:
        listener.close()


async def _serve(app: FastAPI, listener: socket.socket) -> None:
    service: Service = app.state.service
    settings = service.settings
    config = uvicorn.Config(
        app,
        # The service is started here and not by uvicorn's lifespan: probes are answered while models load, and one
        # that does not load is one line.
        lifespan="off",
        http=bounded_protocol(
            settings.header_timeout_ms / 1000,
            settings.body_timeout_ms / 1000,
            lambda reason: service.metrics.problems.labels(reason).inc(),
        ),
        log_config=None,
        access_log=False,
        ws="none",
        backlog=_BACKLOG,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    if service.has_workers:
        one_core_a_thread()
    server = _Server(config, service)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    began = time.monotonic()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(service.start())
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            names, seconds = ", ".join(service.models.names()), round(time.monotonic() - began, 1)
            _log.info("serving", url=url, models=names, kernel=kernel_in_use(), start_s=seconds)
        await serving
    except (ValueError, TypeError, OSError, RuntimeError) as error:  # RuntimeError: no room on the device
        hint = "; torch wants a folder that it may write to: mount /tmp, or set TMPDIR" if _is_no_folder(error) else ""
        raise ServiceError(f"cannot load {settings.model}: {error}{hint}") from error
    finally:
        server.should_exit = True
        starting.cancel()
        await asyncio.gather(serving, starting, return_exceptions=True)
        await service.stop()


class _Server(uvicorn.Server):
    """Uvicorn, but after a signal it keeps listening, and saying 503, until all in flight is answered."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._give_up_at: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals(), _hang_up_handled(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: that one raises the signal again at the end, and the exit status would not be 0.
        # Nothing but flags: a signal may come while a lock is held that a line of log needs.
        if not self._service.draining:
            self._service.drain()
        elif sig != _HANG_UP:  # of which a terminal that is closed may bring two, the kernel's and the shell's
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self._service.draining and self._is_drained())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._is_done():  # in time: uvicorn would give it one more second
            for connection in list(self.server_state.connections):
                if connection.transport.get_write_buffer_size():
                    connection.transport.abort()
            for task in list(self.server_state.tasks):
                task.cancel()
        await super().shutdown(sockets)

    def _is_drained(self) -> bool:
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + self._service.settings.drain_ms / 1000
            _log.info("draining", requests=self._service.active)
        return self._is_done() or time.monotonic() >= self._give_up_at

    def _is_done(self) -> bool:
        """Whether all is answered, and taken: a request ends when its answer is in a buffer here."""
        sending = any(one.transport.get_write_buffer_size() for one in self.server_state.connections)
        return self._service.active == 0 and not sending


@contextlib.contextmanager
def _hang_up_handled(handler: Callable[[int, FrameType | None], None]) -> Generator[None, None, None]:
    """Have a terminal that is closed end the server in order, but for one that was told to outlive it (`nohup`)."""
    in_main = threading.current_thread() is threading.main_thread()
    if _HANG_UP is None or not in_main or signal.getsignal(_HANG_UP) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(_HANG_UP, handler)
    try:
        yield
    finally:
        signal.signal(_HANG_UP, before)


def _is_no_folder(error: Exception) -> bool:
    return "No usable temporary directory" in str(error)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    return uvloop.new_event_loop
