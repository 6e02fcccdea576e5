"""Whatever the world posts: only documented statuses, never a 500, the server alive and right after each."""

import socket
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hostile_inputs import Hostile, corpus
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service_fakes import RELOAD_KEY, Server, encoded, picture, serving

GOOD = encoded(picture((20, 10, 60, 40)))
PNG = {"Content-Type": "image/png"}
# Of what /segment documents, all that is the client's doing.
ALLOWED = {200, 400, 406, 413, 415, 422, 504}
PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """Small limits, so that what is too much need not be much."""
    limits = {"max_bytes": 500_000, "max_pixels": 2_000_000, "max_pictures": 4}
    with serving(reload_key=RELOAD_KEY, **limits) as running:
        yield running


def attack(server: Server, hostile: Hostile) -> int:
    """Post it, check the answer, and that the next client is answered rightly; the status."""
    headers = [(name.encode(), value.encode()) for name, value in hostile.headers.items()]
    url = "/segment" + (f"?{hostile.query}" if hostile.query else "")
    try:
        response = server.client.post(url, content=hostile.body, headers=headers)
    except httpx.RemoteProtocolError:  # a header that is no HTTP: the connection is closed
        response = None
    if response is not None:
        assert response.status_code in ALLOWED, (hostile.name, response.status_code, response.text)
        if response.status_code != 200:
            assert response.headers["content-type"] == PROBLEM, hostile.name
            assert "Traceback" not in response.text and '.py"' not in response.text
    good = server.client.post("/segment", content=GOOD, headers=PNG)
    assert good.status_code == 200, (hostile.name, good.text)
    assert [one["bbox"] for one in good.json()["annotations"]] == [[20, 10, 40, 30]], hostile.name
    return response.status_code if response is not None else 0


def run_corpus(server: Server, count: int) -> Counter:
    seen = Counter(attack(server, hostile) for hostile in corpus(count))
    assert server.metric("dsg_problems_total", reason="internal") == 0
    assert server.metric("dsg_accepted_pictures") == server.metric("dsg_in_flight_bytes") == 0
    assert server.client.get("/healthz").status_code == 200
    return seen


def test_a_part_of_the_corpus(small: Server) -> None:
    seen = run_corpus(small, 600)
    assert {200, 400, 406, 413, 415, 422} <= set(seen), seen


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_corpus(small: Server) -> None:
    seen = run_corpus(small, 2400)
    assert sum(seen.values()) >= 2400


RAW = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown method": b"BREW /segment HTTP/1.1\r\nHost: x\r\n\r\n",
    "method in bytes": b"\xff\xfe /segment HTTP/1.1\r\nHost: x\r\n\r\n",
    "space in the target": b"POST /seg ment HTTP/1.1\r\nHost: x\r\n\r\n",
    "target in bytes": b"POST /\xff\xfe HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "long target": b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "length below nothing": b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "length of no number": b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    "two lengths": b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length and chunks": (
        b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "chunk of no number": b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "chunk beyond all": b"POST /segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40,
    "header with zeros": b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: \0\0\r\n\r\n",
    "header without a name": b"GET /healthz HTTP/1.1\r\n: x\r\n\r\n",
    "folded header": b"GET /healthz HTTP/1.1\r\nA: b\r\n c\r\nHost: x\r\n\r\n",
    "a websocket": (
        b"GET /segment HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    ),
    "smuggled": b"POST /segment HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding : chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_hardly_http(small: Server, name: str) -> None:
    address = (small.client.base_url.host, small.client.base_url.port)
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(RAW[name])
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionError:
            pass
    if answer:
        assert answer.startswith(b"HTTP/1.1 "), answer
        assert int(answer[9:12]) in ALLOWED | {404, 405, 408}, answer
    assert small.client.post("/segment", content=GOOD, headers=PNG).status_code == 200


CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


def test_the_document_is_kept(small: Server) -> None:
    """Requests made up from the OpenAPI document, right ones and wrong ones, for each of its endpoints."""
    schema = schemathesis.openapi.from_url(f"{small.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    probes = {"/healthz", "/readyz", "/metrics"}
    assert {one.path for one in operations} == {"/segment", "/models", "/models/reload"} | probes
    for operation in operations:
        takes = operation.method == "post"
        for mode in schemathesis.GenerationMode if takes else [schemathesis.GenerationMode.POSITIVE]:

            @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                response = case.call()
                assert response.status_code != 500, response.text
                case.validate_response(response, checks=CHECKS)

            ask()
