"""What the engine on Ray is made of, without Ray: merged metrics, answers around its proxy, settings."""

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dsg.service.listen import ServiceError
from dsg.service.peers import merged
from dsg.service.ray_engine import _port, _share, serve_on_ray
from dsg.service.ray_proxy import ProxyAnswers, middlewares
from dsg.service.settings import Settings


def metrics(count: int) -> str:
    registry = CollectorRegistry()
    Counter("asked", "Requests", ["route"], registry=registry).labels('/a "quoted" {path}').inc(count)
    Gauge("waiting", "Now", registry=registry).set(-count)
    Histogram("seconds", "Time", buckets=(1.0,), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_merged_metrics_are_each_replicas_own_under_its_label() -> None:
    families = list(text_string_to_metric_families(merged({"a": metrics(1), "b": metrics(3)}).decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family in two places is no valid page"
    seen = {(s.labels["replica"], s.name): s.value for f in families for s in f.samples if "_created" not in s.name}
    assert seen["a", "asked_total"] == 1 and seen["b", "asked_total"] == 3
    assert seen["a", "waiting"] == -1 and seen["b", "waiting"] == -3
    assert seen["b", "seconds_sum"] == 3 and seen["a", "seconds_count"] == 1
    (asked,) = {s.labels["route"] for f in families for s in f.samples if s.name == "asked_total"}
    assert asked == '/a "quoted" {path}'


def test_merged_metrics_of_none_are_empty() -> None:
    assert merged({}) == b""


class Exchange:
    """One request through the layer, with an application in place of Ray's proxy."""

    def __init__(self, app: Any, body: list[bytes], headers: dict[str, str] | None = None, path: str = "/segment"):
        self.sent: list[Any] = []
        self.reads = 0
        chunks = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        chunks = [*chunks, {"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            self.reads += 1
            return chunks.pop(0) if chunks else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
        asyncio.run(ProxyAnswers(app, max_bytes=100, body_timeout_s=5)(scope, receive, send))
        start, *rest = self.sent
        self.status = start["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        assert len(start["headers"]) == len(self.headers), "a header twice"
        self.body = b"".join(message["body"] for message in rest)


def test_a_proxy_takes_its_two_bounds_and_no_other_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,) = middlewares()
    assert plain.kwargs == {"max_bytes": 32_000_000, "body_timeout_s": 30}
    monkeypatch.setenv("DSG_MAX_BYTES", "1000")
    monkeypatch.setenv("DSG_BODY_TIMEOUT_MS", "500")
    monkeypatch.setenv("DSG_REPLICAS", "2")  # without DSG_ENGINE, as where that was an option of the command
    (given,) = middlewares()
    assert given.kwargs == {"max_bytes": 1000, "body_timeout_s": 0.5}


def answering(status: int, kind: str, body: bytes, *more: tuple[bytes, bytes]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", kind.encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """What Ray's proxy does where a replica dies with a request."""


async def breaking(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("a replica has died")


@pytest.mark.parametrize(
    ("app", "status", "reason"),
    [
        (silent, 503, "replica_lost"),
        (breaking, 503, "replica_lost"),
        (answering(500, "text/plain", b"Traceback ..."), 503, "replica_lost"),
        (answering(404, "text/plain", b"Path '/segment' not found."), 503, "draining"),
        (answering(408, "text/plain", b"timed out"), 504, "deadline_passed"),
        (answering(429, "text/plain", b"too many"), 429, "queue_full"),
        (answering(503, "text/plain", b"unavailable"), 503, "loading"),
    ],
)
def test_rays_own_errors_are_problems_with_a_hint(app: Any, status: int, reason: str) -> None:
    seen = Exchange(app, [b"picture"], {"x-request-id": "photo-7"})
    assert (seen.status, seen.headers["content-type"]) == (status, "application/problem+json")
    assert f'"reason":"{reason}"'.encode() in seen.body and b"Traceback" not in seen.body
    assert int(seen.headers["retry-after"]) > 0 and seen.headers["x-request-id"] == "photo-7"


@pytest.mark.parametrize("status", [200, 404, 422, 429, 500, 503])
def test_a_replicas_answers_pass_as_they_are(status: int) -> None:
    kind = "application/json" if status == 200 else "application/problem+json"
    seen = Exchange(answering(status, kind, b"{}", (b"x-request-id", b"a"), (b"X-Request-ID", b"b")), [])
    assert (seen.status, seen.headers["content-type"], seen.body) == (status, kind, b"{}")
    assert len(seen.headers["x-request-id"]) == 32


def test_rays_probes_are_left_alone() -> None:
    seen = Exchange(answering(503, "text/plain", b"no"), [], path="/-/healthz")
    assert (seen.status, seen.headers["content-type"]) == (503, "text/plain")


async def reading(scope: Any, receive: Any, send: Any) -> None:
    """Ray's proxy: it reads all, and answers nothing where the client has gone."""
    while (message := await receive())["type"] != "http.disconnect":
        if not message["more_body"]:
            await answering(200, "application/json", b"{}")(scope, receive, send)
            return


@pytest.mark.parametrize(
    ("body", "headers", "status", "reads"),
    [
        ([b"x" * 50, b"x" * 50], {}, 200, 3),
        ([b"x" * 50, b"x" * 51, b"x"], {}, 413, 4),  # read to its end: the client looks for no answer before
        ([b"x" * 50] * 9, {}, 413, 5),  # but no further than twice the bound
        ([b"x" * 50] * 9, {"content-length": "450"}, 413, 5),
        ([b"x" * 50] * 9, {"content-length": "450", "expect": "100-continue"}, 413, 0),
    ],
)
def test_a_body_that_is_too_large_ends_at_the_proxy(
    body: list[bytes], headers: dict[str, str], status: int, reads: int
) -> None:
    seen = Exchange(reading, body, headers)
    assert (seen.status, seen.reads) == (status, reads)
    if status == 413:
        assert seen.headers["connection"] == "close" and b'"reason":"too_many_bytes"' in seen.body


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": "2"}, "engine ray"),
        ({"ray_address": "auto"}, "engine ray"),
        ({"engine": "ray", "devices": "all"}, "DSG_DEVICES is for the engine own"),
        ({"engine": "ray", "device": "cuda:1"}, "say cuda"),
        ({"engine": "ray", "replicas": "3-2"}, "the least comes first"),
        ({"engine": "ray", "replicas": "0"}, "replicas"),
        ({"engine": "ray", "replicas": "many"}, "replicas"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**values)


@pytest.mark.parametrize(
    ("values", "resources", "share"),
    [
        ({}, {"CPU": 64, "GPU": 8}, (1, 8, 1, 1)),
        ({"replicas": "4"}, {"CPU": 64, "GPU": 8}, (4, 4, 1, 1)),
        ({"replicas": "2-16"}, {"CPU": 64, "GPU": 8}, (2, 16, 1, 1)),  # a cluster may grow
        ({}, {"CPU": 2}, (1, 1, 0, 2)),
        ({"replicas": "2"}, {"CPU": 2}, (2, 2, 0, 1)),
        ({"replicas": "1-3"}, {"CPU": 2}, (1, 3, 0, 1)),
        ({"device": "cpu"}, {"CPU": 8, "GPU": 2}, (1, 1, 0, 8)),
        ({"device": "cuda", "ray_address": "auto", "replicas": "1-4"}, {"CPU": 8}, (1, 4, 1, 1)),  # it may get GPUs
    ],
)
def test_replicas_and_their_share(values: dict[str, str], resources: dict[str, float], share: tuple[int, ...]) -> None:
    assert _share(Settings(engine="ray", **values), resources) == share


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"device": "cuda"}, "Ray sees no GPU on this machine"),
        ({"port": 0, "ray_address": "auto"}, "a cluster has several: name one"),
    ],
)
def test_what_cannot_be_is_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ServiceError, match=said):
        settings = Settings(engine="ray", **values)
        _port(settings)
        _share(settings, {"CPU": 2})


def test_any_free_port_is_known_before_ray_starts() -> None:
    assert _port(Settings(engine="ray", port=0)) > 0


def test_without_ray_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ServiceError, match=r"pip install 'dsg\[ray\]'"):
        serve_on_ray(Settings(engine="ray", port=0), lambda name, device: pytest.fail("nothing is loaded"))
