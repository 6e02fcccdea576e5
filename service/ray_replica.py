"""One replica of the service on Ray: the whole application, with its batcher and one device, behind Ray's proxy."""

from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from dsg.service import ray_board
from dsg.service.app import create_app
from dsg.service.batching import DeviceLost, OutOfMemory, WorkerDied
from dsg.service.decode import guard_decoding
from dsg.service.devices import LoadPredictor
from dsg.service.logs import configure_log
from dsg.service.problems import Problem
from dsg.service.process import allow_many_files, one_core_a_thread
from dsg.service.settings import Settings
from dsg.service.state import Service


@serve.ingress()
class Replica:
    """What Ray starts, asks for its health, and stops.

    Args:
        settings: of every replica.
        load_predictor: as `create_app` takes it; a function that can be imported where the replica runs.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it, on the loop that the requests run on
        self, settings: Settings, load_predictor: LoadPredictor | None
    ) -> None:
        configure_log()
        guard_decoding()
        allow_many_files()
        self._app = create_app(settings, load_predictor)
        self._service: Service = self._app.state.service
        if self._service.has_workers:
            one_core_a_thread()
        peers = ray_board.BoardPeers(
            serve.get_replica_context().replica_id.unique_id,
            lambda: serve.get_deployment_actor(ray_board.NAME),
            lambda: self._service.metrics.text().decode(),
            self._service.reload_here,
        )
        self._service.peers = peers
        try:
            await self._service.start()
            for name in await peers.join():
                await self._service.reload_here(name)
        except (ValueError, TypeError, OSError, RuntimeError, OutOfMemory, DeviceLost, WorkerDied, Problem) as error:
            await self._service.stop()
            raise RuntimeError(f"{REASON}{str(error).partition(chr(10))[0]}") from None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application without its lifespan: the service is started above, where an error reaches the operator."""
        return _Started(self._app, self._service)

    async def check_health(self) -> None:
        """Raise where this process must be replaced."""
        try:
            self._service.check_healthy()
        except Problem as problem:  # as what every process can read
            raise RuntimeError(problem.detail) from None


REASON = "cannot load: "
"""Before the one line that says why a replica does not start, so that the engine finds it in Ray's report."""


class _Started:
    """An application whose service runs already; it is stopped with the replica."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._service.stop()
        await send({"type": "lifespan.shutdown.complete"})


def deployment(
    settings: Settings,
    load_predictor: LoadPredictor | None,
    *,
    least: int,
    most: int,
    gpus: int,
    cpus: int,
) -> Any:
    """The application to run.

    Args:
        settings: of every replica.
        load_predictor: makes predictors.
        least: replicas at any time.
        most: replicas under load.
        gpus: of each replica: 1, or 0 for a CPU.
        cpus: of each replica.
    """
    scale: dict[str, Any] = {"num_replicas": least}
    if most > least:
        # As many requests as a batch takes keep a replica busy; more of them wait for another one.
        limits = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": settings.max_batch}
        scale = {"autoscaling_config": limits}
    configured: Any = serve.deployment(
        Replica,
        name="segment",
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        # How much a replica holds, its own bounds say, in pictures, pixels and bytes; Ray counts requests.
        max_ongoing_requests=2 * settings.max_queue,
        max_queued_requests=2 * settings.max_queue,
        backpressure_config={"status_code": 429, "retry_after_s": 5},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.drain_ms / 1000,
        health_check_period_s=5,
        max_constructor_retry_count=2,
        deployment_actors=[
            {"name": ray_board.NAME, "actor_class": ray.remote(ray_board.Board), "actor_options": {"num_cpus": 0}}
        ],
        **scale,
    )
    return configured.bind(settings, load_predictor)
