"""The service on Ray Serve: replicas behind Ray's proxy, on this machine or on a cluster; Ray's extra is needed.

Each replica is the whole application with one device (`dsg.service.ray_replica`), so that a request meets the same code
as with the engine of our own. Ray spreads requests over the replicas, starts those that die again and follows the load.
`dsg.service.ray_proxy` makes its proxies answer as the contract says.
"""

import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import structlog

from dsg.service.devices import LoadPredictor
from dsg.service.listen import ServiceError, listen
from dsg.service.models import kernel_in_use
from dsg.service.settings import Settings

_log = structlog.get_logger("dsg.service")
_APPLICATION = "dsg"
_FOR_REPLICAS = ("DSG_TRUST_CODE", "DSG_OPS", "DSG_DEBUG")  # variables that are no settings of the service
_LOOK_S = 5.0  # between two looks at whether Ray is still there
_PATIENCE_S = 30.0  # until it is said that replicas are waited for: a cluster may have no GPU free
_CONNECT_S = 5.0
_MORE_S = 10.0  # that Ray's proxy allows a request beyond the service's own bounds


def serve_on_ray(settings: Settings, load_predictor: LoadPredictor | None) -> None:
    """Run replicas until SIGTERM or SIGINT; then let them finish what they have, and return.

    Without `settings.ray_address`, Ray is started on this machine and ends with it. On a cluster the application is
    removed at the end, and the cluster stays.

    Raises:
        ServiceError: Ray is not installed or not there, the port is taken, a model does not load, Ray has ended.
    """
    began = time.monotonic()
    port = _port(settings)
    with _ray(settings) as ray, _signals() as stopped:
        from ray import serve

        from dsg.service.ray_replica import deployment

        resources = ray.cluster_resources()
        least, most, gpus, cpus = _share(settings, resources)
        limits = settings.deadline_ms + settings.body_timeout_ms
        options = {"host": settings.host, "port": port, "request_timeout_s": limits / 1000 + _MORE_S}
        application = deployment(settings, load_predictor, least=least, most=most, gpus=gpus, cpus=cpus)
        try:
            serve.start(proxy_location="EveryNode", http_options=options, logging_config={"log_level": "WARNING"})
            _start(serve, application, stopped)
            if not stopped.is_set():
                url = f"http://{settings.host}:{port}"
                start_s = round(time.monotonic() - began, 1)
                scale = f"{least}-{most}" if most > least else str(least)
                models = ", ".join(settings.models)
                _log.info("serving", url=url, models=models, kernel=kernel_in_use(), start_s=start_s, replicas=scale)
            while not stopped.wait(_LOOK_S):
                _look(serve)
            _log.info("draining")
        except ray.exceptions.RayError as error:
            raise ServiceError(f"Ray cannot start the service: {str(error).strip().splitlines()[-1]}") from error
        finally:
            _end(serve, settings)


@contextlib.contextmanager
def _ray(settings: Settings) -> Iterator[Any]:
    """Ray, started here or joined."""
    try:
        import ray
        import ray.serve
    except ImportError:
        raise ServiceError("the engine ray needs Ray: pip install 'dsg[ray]'") from None
    from dsg.service.ray_proxy import IMPORT_PATH

    # Ray hands these down to its proxies and replicas, and shows them on its dashboard: no setting with a key is among
    # them. Replicas are given all settings as they are.
    ours = {name: value for name, value in os.environ.items() if name in _FOR_REPLICAS or name.startswith("OTEL_")}
    ours |= {f"DSG_{name.upper()}": str(getattr(settings, name)) for name in ("max_bytes", "body_timeout_ms")}
    ours["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = IMPORT_PATH
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray's makers are told nothing unless someone wants it
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it does, our own lines say
    _check_address(settings.ray_address)
    try:
        ray.init(
            address=settings.ray_address or "local",
            include_dashboard=False if settings.ray_address is None else None,
            runtime_env={"env_vars": ours},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        if settings.ray_address is None:
            raise ServiceError(f"Ray does not start here: {str(error).partition(chr(10))[0]}") from error
        token = "a cluster that asks for a token wants RAY_AUTH_MODE=token and the token in ~/.ray/auth_token"
        raise ServiceError(f"no Ray at {settings.ray_address}: {str(error).partition(chr(10))[0]}; {token}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _port(settings: Settings) -> int:
    """The port to serve on; one that is taken shows here, and not minutes later in Ray's log."""
    if settings.ray_address is not None:
        if settings.port == 0:
            raise ServiceError("port 0 takes any port of this machine, and a cluster has several: name one")
        return settings.port
    with listen(settings.host, settings.port) as listener:
        port: int = listener.getsockname()[1]
    return port


def _check_address(address: str | None) -> None:
    """Raise where nothing listens at an address that names a host and a port: Ray would try for minutes."""
    named = re.fullmatch(r"(?:ray://)?([^:/]+|\[[^]]+\]):(\d+)", address or "")
    if named is None:
        return
    try:
        socket.create_connection((named[1].strip("[]"), int(named[2])), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ServiceError(f"no Ray at {address}: {error.strerror or error}") from None


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first signal sets; a second one ends this process at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _share(settings: Settings, resources: dict[str, float]) -> tuple[int, int, int, int]:
    """Least and most replicas, GPUs and CPUs of each."""
    gpus = int(resources.get("GPU", 0))
    on_cpu = settings.device == "cpu" or (settings.device is None and gpus == 0)
    if not on_cpu and gpus == 0 and settings.ray_address is None:
        raise ServiceError("device cuda is not there: Ray sees no GPU on this machine")
    least, most = settings.replica_range
    if settings.replicas is None and not on_cpu:
        most = max(1, gpus)
    # Of a machine without a GPU, all cores work for the network; beside a GPU one is enough to keep count of.
    cpus = max(1, int(resources.get("CPU", 1)) // most) if on_cpu else 1
    return least, most, 0 if on_cpu else 1, cpus


def _start(serve: Any, application: Any, stopped: threading.Event) -> None:
    """Deploy, and wait until the least number of replicas runs or someone stops it."""
    target = serve.RunTarget(application, name=_APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    told_at = time.monotonic() + _PATIENCE_S
    while not stopped.wait(0.2):
        status = serve.status().applications[_APPLICATION]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServiceError(_reason(status))
        if time.monotonic() > told_at:
            told_at = math.inf
            waiting = " ".join(one.message for one in status.deployments.values())
            _log.warning("waiting", reason=waiting or "replicas have not started yet")


def _reason(status: Any) -> str:
    from dsg.service.ray_replica import REASON

    said = "\n".join([status.message, *(one.message for one in status.deployments.values())])
    lines = [line.partition(REASON)[2] for line in said.splitlines() if REASON in line]
    return f"{REASON}{lines[-1]}" if lines else f"Ray cannot start the service: {said.strip().splitlines()[-1]}"


def _look(serve: Any) -> None:
    """Raise where Ray is gone or has given the application up."""
    try:
        application = serve.status().applications.get(_APPLICATION)
    except Exception as error:
        raise ServiceError(f"Ray has ended: {str(error).partition(chr(10))[0]}") from error
    if application is None:
        raise ServiceError("the application was removed from Ray; start it again")
    if application.status == "UNHEALTHY":
        _log.warning("unhealthy", reason=application.message)


def _end(serve: Any, settings: Settings) -> None:
    """Let the replicas finish, and remove them; of a cluster nothing that others use."""
    with contextlib.suppress(Exception):  # Ray may be gone
        serve.delete(_APPLICATION)
        if settings.ray_address is not None and not serve.status().applications:
            serve.shutdown()
