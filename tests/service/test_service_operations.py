"""What operators set and see: keys, CORS, documentation, bounds in flight, probes, slow headers, spans."""

import queue
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from service_fakes import Server, encoded, picture, serving
from service_process import server_process

from dsg.service.settings import Settings

GOOD = encoded(picture((20, 10, 60, 40)))
PNG = {"Content-Type": "image/png"}
KEYS = ("the-first-key-of-clients", "the-second-key-of-clients")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with serving(api_keys=", ".join(KEYS), cors_origins="https://example.org") as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEYS[0]}"},
        {"Authorization": f"bearer {KEYS[1]}"},
        {"X-API-Key": KEYS[1]},
        {"Authorization": "Bearer of another gate", "X-API-Key": KEYS[1]},
    ],
)
def test_with_a_key(guarded: Server, headers: dict[str, str]) -> None:
    assert guarded.post(GOOD, headers=headers).status_code == 200
    assert guarded.client.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer"}, {"X-API-Key": KEYS[0][:-1]}, {"X-API-Key": ",".join(KEYS)}, {"X-API-Key": ""}],
)
def test_without_one(guarded: Server, headers: dict[str, str]) -> None:
    for response in (guarded.post(GOOD, headers=headers), guarded.client.get("/models", headers=headers)):
        assert (response.status_code, response.json()["reason"]) == (401, "wrong_key")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/metrics"):  # whoever watches has none
        assert guarded.client.get(path).status_code == 200


def test_the_document_says_who_needs_a_key(guarded: Server, server: Server) -> None:
    wants = guarded.client.get("/openapi.json").json()["paths"]["/segment"]["post"]
    assert wants["security"] == [{"key": []}, {"key header": []}]
    assert "security" not in server.client.get("/openapi.json").json()["paths"]["/segment"]["post"]


def test_short_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="16 characters"):
        Settings(api_keys=f"{KEYS[0]},short")


def test_pages_of_named_origins_alone_may_call(guarded: Server, server: Server) -> None:
    def asked(one: Server, origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return one.client.options("/segment", headers=headers)

    allowed = asked(guarded, "https://example.org")
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in asked(guarded, "https://other.org").headers
    off = asked(server, "https://example.org")
    assert off.status_code == 405 and "access-control-allow-origin" not in off.headers


def test_documentation_comes_from_this_server_alone(server: Server) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200 and "https://" not in page.text and "http://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name, kind in (("swagger-ui-bundle.js", "text/javascript"), ("swagger-ui.css", "text/css")):
        assert f"docs/{name}" in page.text
        asset = server.client.get(f"/docs/{name}")
        assert asset.status_code == 200 and asset.headers["content-type"].startswith(kind)
        assert len(asset.content) > 50_000
    assert server.client.get("/docs/other.js").status_code == 404


def test_methods_that_are_not_there_make_no_series_of_their_own(server: Server) -> None:
    for method in ("PUT", "DELETE", "PATCH", "GET"):
        assert server.client.request(method, "/segment").status_code == 405
    lines = [line for line in server.client.get("/metrics").text.splitlines() if 'status="405"' in line]
    assert {line.split('method="')[1].split('"')[0] for line in lines if "/segment" in line} == {"(any)"}


def test_counters_begin_at_0(server: Server) -> None:
    lines = server.client.get("/metrics").text.splitlines()
    assert 'dsg_model_reloads_total{result="failed"} 0.0' in lines
    assert 'dsg_worker_deaths_total{device="cpu"} 0.0' in lines


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_pixels": 10_000, "max_pixels_in_flight": 10_000}, "pixels"),
        ({"max_bytes": len(GOOD) + 10, "max_bytes_in_flight": len(GOOD) + 10}, "bytes"),
        ({"max_queue": 1, "max_pictures": 1}, "pictures"),
    ],
)
def test_what_is_in_flight_is_bounded(limits: dict[str, int], reason: str) -> None:
    answers: queue.Queue[httpx.Response] = queue.Queue()
    with serving(decode_workers=2, **limits) as server:
        opened, entered = threading.Event(), threading.Event()
        served = server.service.models.get(None)
        prepare = served.prepare

        def slow(image: object) -> object:
            entered.set()
            assert opened.wait(60)
            return prepare(image)

        object.__setattr__(served, "prepare", slow)  # the first picture stays in decode, with all that it holds
        threading.Thread(
            target=lambda: answers.put(httpx.post(f"{server.base_url}/segment", content=GOOD, headers=PNG, timeout=60))
        ).start()
        assert entered.wait(60)
        response = server.post(GOOD)
        assert (response.status_code, response.json()["reason"]) == (429, "queue_full"), response.text
        assert int(response.headers["retry-after"]) >= 1
        assert server.metric("dsg_rejected_requests_total", reason=reason) == 1
        opened.set()
        assert answers.get(timeout=60).status_code == 200
        server.await_metric("dsg_accepted_pictures", 0)
        assert server.post(GOOD).status_code == 200


def test_what_cannot_be_in_time_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        monkeypatch.setattr(server.service.admission, "_seconds_of_queue", lambda: 3.0)
        response = server.post(GOOD, headers={"X-Timeout-Ms": "500"})
        assert (response.status_code, response.json()["reason"]) == (429, "deadline_unreachable")
        assert response.headers["retry-after"] == "3"
        assert server.post(GOOD, headers={"X-Timeout-Ms": "5000"}).status_code == 200
        assert server.metric("dsg_rejected_requests_total", reason="deadline") == 1


def test_retry_after_is_the_measured_pace() -> None:
    with serving(max_queue=2, max_pictures=2) as server:
        server.service.batcher._queue.pace.ran(pictures=1, pixels=1000, seconds=4.0)
        files = [("image", ("a.png", GOOD, "image/png"))] * 2
        server.predictor.wait_entered()  # the warm-up
        server.predictor.gate.clear()
        thread = threading.Thread(target=lambda: httpx.post(f"{server.base_url}/segment", files=files, timeout=60))
        thread.start()
        server.predictor.wait_entered()
        assert server.post(GOOD).headers["retry-after"] == "4"
        server.predictor.gate.set()
        thread.join(60)


def test_while_models_load_probes_are_answered() -> None:
    with serving() as server:
        server.service._warm = False
        assert server.client.get("/healthz").status_code == 200
        for response in (server.client.get("/readyz"), server.post(GOOD)):
            assert (response.status_code, response.json()["reason"]) == (503, "loading")
            assert int(response.headers["retry-after"]) > 0


def test_headers_have_a_time_and_a_size() -> None:
    with server_process(header_timeout_ms=300) as server:
        host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
        for sent, status in (
            (b"POST /segment HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 408 "),
            (b"GET / HTTP/1.1\r\n" + b"A: " + b"x" * 70_000, b"HTTP/1.1 431 "),
            (b"hello\r\n\r\n", b"HTTP/1.1 400 "),
            (b"", b""),
        ):
            with socket.create_connection((host, port), timeout=60) as connection:
                connection.sendall(sent)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until the server closes
            assert answer.startswith(status), answer
            assert not answer or b"application/problem+json" in answer
        with httpx.Client(base_url=server.url) as client:  # a kept connection has its time for each request anew
            for _ in range(3):
                assert client.post("/segment", content=GOOD, headers=PNG).status_code == 200


class _Collector(BaseHTTPRequestHandler):
    spans: queue.Queue[bytes] = queue.Queue()

    def do_POST(self) -> None:
        self.spans.put(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_spans_are_sent_where_the_operator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = HTTPServer(("127.0.0.1", 0), _Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serving(tracing=True) as server:
        response = server.post(GOOD, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        assert response.status_code == 200
        server.await_metric("dsg_request_duration_seconds_count", 1, route="/segment", method="POST", status="200")
    request = ExportTraceServiceRequest.FromString(_Collector.spans.get(timeout=60))
    (resource,) = request.resource_spans
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"POST /segment", "decode", "queue", "infer", "encode"}
    whole = spans["POST /segment"]
    assert whole.trace_id.hex() == trace and whole.parent_span_id.hex() == "b7ad6b7169203331"
    for stage in ("decode", "queue", "infer", "encode"):
        assert spans[stage].parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= spans[stage].start_time_unix_nano <= whole.end_time_unix_nano
    collector.shutdown()
    thread.join(60)
    collector.server_close()
