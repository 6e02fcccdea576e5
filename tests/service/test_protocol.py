"""HTTP on a socket: what a client sends is read as it was meant, and none holds a connection or memory for ever."""

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from service_fakes import _ThreadServer

from dsg.service.protocol import bounded_protocol

PATIENCE_S = 60
LARGE = 40_000_000


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it got; `/early` before the body is read, `/large` with a lot."""
    body = b""
    while scope["path"] != "/early":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    content = json.dumps({"method": scope["method"], "headers": headers, "body": body.decode()}).encode()
    if scope["path"] == "/large":
        content = b"x" * LARGE
    lines = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": lines})
    await send({"type": "http.response.body", "body": content})


class Server:
    def __init__(self, timeout_s: float, stall_s: float) -> None:
        self.refused: list[str] = []
        http = bounded_protocol(timeout_s, stall_s, self.refused.append)
        config = uvicorn.Config(echo, host="127.0.0.1", port=0, log_config=None, ws="none", http=http, lifespan="off")
        self.uvicorn = _ThreadServer(config)

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        address = self.uvicorn.servers[0].sockets[0].getsockname()
        with socket.create_connection(address, timeout=PATIENCE_S) as connection:
            yield connection


@contextmanager
def serving(timeout_s: float = PATIENCE_S, stall_s: float = PATIENCE_S) -> Iterator[Server]:
    server = Server(timeout_s, stall_s)
    thread = threading.Thread(target=server.uvicorn.run)
    thread.start()
    assert server.uvicorn.listening.wait(PATIENCE_S)
    try:
        yield server
    finally:
        server.uvicorn.should_exit = True
        thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and document of the next answer."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return status, json.loads(file.read(length))


def until_closed(connection: socket.socket) -> bytes:
    got = b""
    try:
        while piece := connection.recv(1 << 20):
            got += piece
    except ConnectionResetError:
        pass
    return got


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
FRAMED = (b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")


@given(st.sampled_from(FRAMED), st.lists(st.integers(1, 200), max_size=4))
def test_another_protocol_that_is_offered_is_declined_and_the_body_read(
    server: Server, framed: bytes, cuts: list[int]
) -> None:
    request = b"POST /a HTTP/1.1\r\nHost: x\r\n" + UPGRADE + framed
    with server.connected() as connection:
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(request)], strict=True):
            connection.sendall(request[start:end])
        status, got = answer(connection)
        assert (status, got["method"], got["body"]) == (200, "POST", "hello")
        connection.sendall(b"GET /b HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n")
        assert answer(connection)[1]["method"] == "GET"
        connection.sendall(b"POST /c HTTP/1.1\r\nHost: x\r\n" + FRAMED[0])  # the connection goes on
        assert answer(connection)[1]["body"] == "hello"


def test_trailers_are_no_headers(server: Server) -> None:
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connected() as connection:
        connection.sendall(chunked + b"5\r\nhello\r\n0\r\nX-API-Key: stolen\r\n\r\n")
        status, got = answer(connection)
        assert (status, got["body"]) == (200, "hello") and "x-api-key" not in got["headers"]
        connection.sendall(chunked + b"0\r\nX-API-Key: stolen\r\n\r\n")
        assert "x-api-key" not in answer(connection)[1]["headers"]


@pytest.mark.parametrize("ahead", [b"0\r\nX: ", b"0\r\n", b"1;x="])
def test_trailers_and_chunks_have_an_end(server: Server, ahead: bytes) -> None:
    line = b"X: " + b"y" * 1000 + b"\r\n" if ahead == b"0\r\n" else b"y" * 1000
    with server.connected() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + ahead)
        sent = 0
        try:
            while not select.select([connection], [], [], 0)[0]:
                sent += connection.send(line)
                assert sent < 30_000_000  # what the system's buffers hold is far less
        except (ConnectionResetError, BrokenPipeError):
            return
        assert until_closed(connection).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(("size", "status"), [(60_000, 200), (70_000, 431), (1_000_000, 431)])
def test_headers_have_a_size_however_they_come(server: Server, size: int, status: int) -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"y" * size + b"\r\n\r\n"
    with server.connected() as connection:
        try:
            connection.sendall(request)
        except (ConnectionResetError, BrokenPipeError):
            assert status == 431
        assert answer(connection)[0] == status
    assert server.refused[-1:] == (["large_headers"] if status == 431 else server.refused[-1:])


def test_blanks_around_a_value_are_no_part_of_it(server: Server) -> None:
    with server.connected() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Timeout-Ms: \t 5000 \t \r\n\r\n")
        assert answer(connection)[1]["headers"]["x-timeout-ms"] == "5000"


@pytest.mark.parametrize(
    ("request_", "drip"),
    [
        (b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
    ],
)
def test_nobody_holds_a_connection_that_has_its_answer(request_: bytes, drip: bytes) -> None:
    with serving(timeout_s=0.2) as server, server.connected() as connection:
        connection.sendall(request_)
        assert answer(connection)[0] == 200
        try:
            for _ in range(2000):  # twenty seconds, a hundred times what is allowed
                if select.select([connection], [], [], 0.01)[0] and connection.recv(1000) == b"":
                    return
                connection.sendall(drip)
        except (ConnectionResetError, BrokenPipeError):
            return
        pytest.fail("still connected")


def test_an_answer_that_nobody_reads_is_let_go() -> None:
    with serving(stall_s=0.1) as server:
        with server.connected() as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            gone = threading.Event()
            for _ in range(PATIENCE_S * 100):
                if not server.uvicorn.server_state.connections or gone.wait(0.01):
                    break
            assert not server.uvicorn.server_state.connections
            assert len(until_closed(connection)) < LARGE
        with server.connected() as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert len(until_closed(connection)) > LARGE  # one that is read comes whole
