"""Around Ray's HTTP proxy: the contract's errors where Ray has its own, bounds, and a hint when to try again.

Ray calls `middlewares` in each proxy, because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it in the environment
that `dsg.service.ray_engine` gives them. The proxy answers when no replica does: the one that had the request died,
none is there yet, all are busy. Ray says that in plain text, some of it with 500 and no word of when to try again.
"""

import asyncio
import contextlib
import os
import re
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsg.service.middleware import request_id_of
from dsg.service.problems import Problem, deadline_passed, problem_response, too_many_bytes
from dsg.service.settings import Settings

IMPORT_PATH = "dsg.service.ray_proxy:middlewares"
_PROBLEM = b"application/problem+json"
_RAYS_OWN = re.compile(r"/-/")  # Ray's probes and routes


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxies."""
    # These two alone: a setting that means something to `dsg serve` must not keep a proxy from starting.
    max_bytes, body_timeout_ms = (_from_environment(name) for name in ("max_bytes", "body_timeout_ms"))
    return [Middleware(ProxyAnswers, max_bytes=max_bytes, body_timeout_s=body_timeout_ms / 1000)]


def _from_environment(name: str) -> int:
    return int(os.environ.get(f"DSG_{name.upper()}") or Settings.model_fields[name].default)


class ProxyAnswers:
    """Outermost layer of a proxy.

    Args:
        app: the proxy.
        max_bytes: largest body. A proxy reads bodies before a replica asks for them, and would hold any size.
        body_timeout_s: how long the rest of one that is too large may take to come, to be thrown away.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _RAYS_OWN.match(scope["path"]):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._max_bytes)
        if not exchange.too_many:
            try:
                await self._app(exchange.scope, exchange.receive, exchange.send)
            except Exception:
                if exchange.started:
                    raise
        if exchange.started:
            return
        if exchange.too_many:
            await exchange.throw_rest_away(self._body_timeout_s)
            await exchange.answer(too_many_bytes(self._max_bytes))
        else:
            await exchange.answer(exchange.problem())


class _Exchange:
    """One request and its answer on their way through."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self._request_id = request_id_of(scope).encode()
        others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        # Ray and the replica both name a request; with this they agree.
        self.scope: Scope = {**scope, "headers": [*others, (b"x-request-id", self._request_id)]}
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._taken = 0
        self._rays_status = 0
        self.started = False
        """Whether an answer of a replica's has begun."""
        declared = dict(self.scope["headers"]).get(b"content-length", b"")
        self.too_many = declared.isdigit() and int(declared[:20]) > max_bytes
        """Whether the body is too large, as it declares or as it came."""

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            if self._taken > self._max_bytes:
                self.too_many = True
                return {"type": "http.disconnect"}  # Ray then gives the request up
        return message

    async def throw_rest_away(self, timeout_s: float) -> None:
        """Most clients look for an answer only once they have sent all; those who ask first have sent nothing yet."""
        if b"expect" in dict(self.scope["headers"]):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._taken <= 2 * self._max_bytes:
                    message = await self._receive()
                    self._taken += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message["headers"]]
            kind = dict(headers).get(b"content-type", b"")
            if self.too_many or (message["status"] >= 400 and not kind.startswith(_PROBLEM)):
                self._rays_status = message["status"]
                return
            self.started = True
            own = [(name, value) for name, value in headers if name != b"x-request-id"]
            message = {**message, "headers": [*own, (b"x-request-id", self._request_id)]}
        if self.started:
            await self._send(message)

    def problem(self) -> Problem:
        """What Ray's own answer means here."""
        again = {"Retry-After": "5"}
        if self._rays_status == 404:
            # All paths are the application's, which says itself what it does not have.
            return Problem(503, "draining", "the service is starting or about to stop; try again soon", again)
        if self._rays_status == 408:
            return deadline_passed(again)
        if self._rays_status == 429:
            return Problem(429, "queue_full", "as many requests as may wait do; try again in 5 s", again)
        if self._rays_status == 503:
            return Problem(503, "loading", "no replica can take this request yet; try again soon", again)
        # Ray sends nothing, or 500, where the replica that held the request is gone.
        detail = "the replica that had this request is gone; send it again"
        return Problem(503, "replica_lost", detail, {"Retry-After": "1"})

    async def answer(self, problem: Problem) -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = [*message["headers"], (b"x-request-id", self._request_id)]
                message = {**message, "headers": headers}
            await self._send(message)

        await problem_response(problem)(self.scope, self._receive, send)
