"""Around every request: an id, a log line, a duration in the metrics, an answer when our code breaks.

Plain ASGI. Starlette's BaseHTTPMiddleware puts a stream between server and application, behind which an
application no longer sees that its client has hung up.
"""

import asyncio
import re
import time
import uuid
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsg.service.problems import internal_error, is_shortage, problem_response, server_is_full, stopping
from dsg.service.state import Service

_log = structlog.get_logger("dsg.service")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Probes and scrapes come every few seconds for ever; they are logged only when they fail.
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


class RequestMiddleware:
    """Outermost layer of the application.

    Routes may add to the log line through `request.state.log`, a dict, and say in `request.state.stages` which parts of
    the request took how many seconds.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = request_id_of(scope)
        log: dict[str, Any] = {}
        scope.setdefault("state", {})
        scope["state"]["log"] = log
        scope["state"]["started"] = started
        scope["state"]["stages"] = {}
        status = 0
        # A client that asks first ("Expect: 100-continue") waits until somebody reads.
        holds_back = any(name == b"expect" for name, _ in scope["headers"])

        async def receive_body() -> Message:
            nonlocal holds_back
            holds_back = False
            return await receive()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode())]
                # A client that kept its connection would send its next request into a closing one, or where the body
                # is expected that it has held back.
                if (self._service.draining or holds_back) and all(name != b"connection" for name, _ in headers):
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        self._service.active += 1
        self._service.metrics.active.set(self._service.active)
        try:
            await self._app(scope, receive_body, send_with_id)
        except Exception as error:
            if is_shortage(error):
                _log.error("out of memory, threads or files", request_id=request_id, error=str(error)[:500])
                problem = server_is_full()
            else:
                _log.exception("request failed", request_id=request_id, path=scope["path"])
                problem = internal_error()
            log["reason"] = problem.reason
            if status == 0:
                await problem_response(problem)(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # Only a server that has run out of patience at its end cancels a request; its client is still told.
            log["reason"] = "draining"
            if status == 0:
                await problem_response(stopping())(scope, receive, send_with_id)
        finally:
            self._service.active -= 1
            self._service.metrics.active.set(self._service.active)
            self._record(scope, request_id, status, time.monotonic() - started, log)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float, log: dict[str, Any]) -> None:
        metrics = self._service.metrics
        # The route's own path, not the client's: each path that someone makes up must not become a time
        # series, nor each method that a route does not have.
        route = getattr(scope.get("route"), "path", "(none)")
        method = scope["method"] if route != "(none)" and status != 405 else "(any)"
        metrics.requests.labels(route, method, str(status)).observe(seconds)
        if "reason" in log:
            metrics.problems.labels(log["reason"]).inc()
        if status >= 400 or scope["path"] not in _QUIET:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            attributes = {
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status,
                "request_id": request_id,
            }
            stages = scope["state"]["stages"]
            self._service.tracing.record(headers, f"{method} {route}", seconds, stages, attributes, status >= 500)
            _log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=round(seconds * 1000, 1),
                **log,
            )


def request_id_of(scope: Scope) -> str:
    """The client's own id if it is a plain word, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return uuid.uuid4().hex
