"""One server process: a port, a log, the application, and an orderly end."""

import asyncio
import socket
import time
from collections.abc import Callable
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


def serve(settings: Settings, load_predictor: LoadPredictor | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is in flight, within `settings.drain_ms`, and return.

    A second signal ends it at once.

    Raises:
        ServiceError: the port is taken, a model does not load, or there is no Ray where its engine is asked for.
    """
    configure_log()
    if settings.engine == "ray":
        from dsg.service.ray_engine import serve_on_ray

        serve_on_ray(settings, load_predictor)
        return
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
        http=bounded_protocol(settings.header_timeout_ms / 1000),
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
        raise ServiceError(f"cannot load {settings.model}: {error}") from error
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: that one raises the signal again at the end, and the exit status would not be 0.
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        # Nothing but flags: a signal may come in the middle of a log line, whose lock is not free then.
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self._service.draining and self._is_drained())

    def _is_drained(self) -> bool:
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + self._service.settings.drain_ms / 1000
            _log.info("draining", requests=self._service.active)
        return self._service.active == 0 or time.monotonic() >= self._give_up_at


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    return uvloop.new_event_loop
