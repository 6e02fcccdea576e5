"""The client against a real server, and against answers made up here where a server would have to be broken."""

import asyncio
import contextlib
import gzip
import http.server
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from service_fakes import Server, encoded, picture, serving

from dsg.service import client as client_module
from dsg.service.client import AsyncClient, Client, SegmentError

GOOD = encoded(picture((20, 10, 60, 40)))
BOX = [20, 10, 40, 30]
KEY = "a-key-of-a-client-long-enough"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long a client would have waited; none does."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    # The names in that module alone: servers of other tests run in this process and sleep too.
    own_time = SimpleNamespace(monotonic=time.monotonic, sleep=waited.append)
    monkeypatch.setattr(client_module, "time", own_time)
    own_asyncio = SimpleNamespace(to_thread=asyncio.to_thread, timeout=asyncio.timeout, sleep=sleep)
    monkeypatch.setattr(client_module, "asyncio", own_asyncio)
    return waited


def test_it_asks_for_what_it_is_told(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(GOOD)
    with Client(server.base_url) as client:
        answer = client.segment([path, GOOD], score_threshold=0.2, categories=["red"], mask_format="none")
        assert [one["file_name"] for one in answer["images"]] == ["photo.png", "1"]
        assert [(one["image_id"], one["bbox"], one["segmentation"]) for one in answer["annotations"]] == [
            (1, BOX, []),
            (2, BOX, []),
        ]
        assert client.segment(str(path), max_detections=1)["annotations"][0]["bbox"] == BOX
        assert client.draw(GOOD).startswith(b"\x89PNG")
        assert [one["name"] for one in client.models()] == ["fake"]
        with pytest.raises(SegmentError, match="422 unknown_model") as caught:
            client.segment(GOOD, model="other")
        assert (caught.value.status, caught.value.reason) == (422, "unknown_model") and caught.value.request_id
        with pytest.raises(SegmentError) as caught:
            client.segment([GOOD, b"nonsense"])
        assert (caught.value.status, caught.value.index) == (400, 1)
        with pytest.raises(FileNotFoundError):
            client.segment(tmp_path / "missing.png")


def test_asynchronously_the_same(server: Server) -> None:
    async def ask() -> None:
        async with AsyncClient(server.base_url) as client:
            answers = await asyncio.gather(*(client.segment(GOOD) for _ in range(5)))
            assert [one["annotations"][0]["bbox"] for one in answers] == [BOX] * 5
            assert (await client.draw(GOOD)).startswith(b"\x89PNG")
            assert [one["name"] for one in await client.models()] == ["fake"]
            with pytest.raises(SegmentError, match="400 not_a_picture"):
                await client.segment(b"nonsense")

    asyncio.run(ask())


def test_with_a_key() -> None:
    with serving(api_keys=KEY) as server:
        with Client(server.base_url) as client, pytest.raises(SegmentError, match="401 wrong_key"):
            client.segment(GOOD)
        with Client(server.base_url, key=KEY) as client:
            assert client.segment(GOOD)["annotations"][0]["bbox"] == BOX
            assert client.models()


def answers(*given: int | Exception, retry_after: str | None = "7") -> Callable[[httpx.Request], httpx.Response]:
    left = list(given)

    def answer(request: httpx.Request) -> httpx.Response:
        status = left.pop(0)
        if isinstance(status, Exception):
            raise status
        if status == 200:
            return httpx.Response(200, json={"annotations": []})
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        return httpx.Response(status, json={"reason": "queue_full", "detail": "full"}, headers=headers)

    return answer


def test_it_waits_as_told(waits: list[float]) -> None:
    with Client("http://test", transport=httpx.MockTransport(answers(429, 503, 200))) as client:
        assert client.segment(b"x") == {"annotations": []}
    assert len(waits) == 2 and all(7 <= wait <= 7 * 1.25 for wait in waits)


def test_it_waits_as_told_asynchronously(waits: list[float]) -> None:
    async def ask() -> dict:
        async with AsyncClient("http://test", transport=httpx.MockTransport(answers(429, 200))) as client:
            return await client.segment(b"x")

    assert asyncio.run(ask()) == {"annotations": []}
    assert len(waits) == 1 and 7 <= waits[0] <= 7 * 1.25


def test_it_comes_back_to_a_server_that_was_away(waits: list[float]) -> None:
    gone = httpx.ConnectError("refused")
    transport = httpx.MockTransport(answers(gone, httpx.ReadError("reset"), 503, 200, retry_after=None))
    with Client("http://test", transport=transport) as client:
        client.segment(b"x")
    assert [round(wait, 2) >= pause for wait, pause in zip(waits, (0.25, 0.5, 1.0), strict=True)] == [True] * 3


@pytest.mark.parametrize("hence", [timedelta(seconds=40), timedelta(seconds=-40)])
def test_it_waits_until_a_date(waits: list[float], hence: timedelta) -> None:
    date = format_datetime(datetime.now(UTC) + hence, usegmt=True)
    transport = httpx.MockTransport(answers(503, 200, retry_after=date))
    with Client("http://test", timeout_s=90, transport=transport) as client:
        client.segment(b"x")
    assert len(waits) == 1 and (38 < waits[0] <= 40 * 1.25 if hence.total_seconds() > 0 else waits[0] == 0)


both_kinds = pytest.mark.parametrize("kind", [Client, AsyncClient])


@both_kinds
@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:abc",
        "http://host:99999",
        "http://host:0",
        f"http://{'a' * 64}.com",
        "http://a..b",
        "http://xn--/",
        "http://host/api?x=1",
        "http://host/api#x",
        "http://bob:PASSWORD@host:99999",
        "",
    ],
)
def test_a_url_that_can_be_no_servers(kind: type, url: str) -> None:
    with pytest.raises(ValueError, match=r"url.*: give http:// or https://, a host") as caught:
        kind(url)
    assert "PASSWORD" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


@both_kinds
@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_time_that_cannot_be(kind: type, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s is a number of seconds above 0"):
        kind("http://host", timeout_s=timeout_s)


@both_kinds
@pytest.mark.parametrize("key", ["SECRET\nSECRET", "SECRETü", "SECRET\x00"])
def test_a_key_that_cannot_be_is_not_repeated(kind: type, key: str) -> None:
    with pytest.raises(ValueError, match="the key has something in it") as caught:
        kind("http://host", key=key)
    assert "SECRET" not in str(caught.value)


def test_a_key_from_a_file() -> None:
    with serving(api_keys=KEY) as server, Client(server.base_url, key=f"{KEY}\n") as client:
        assert client.models()


def test_a_password_is_not_repeated(waits: list[float]) -> None:
    with Client("http://bob:PASSWORD@127.0.0.1:1") as client, pytest.raises(SegmentError) as caught:
        client.models()
    assert "http://127.0.0.1:1" in str(caught.value) and "PASSWORD" not in str(caught.value)


def test_a_client_that_was_closed() -> None:
    client = Client("http://127.0.0.1:1")
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


def test_a_name_that_is_not_utf_8(server: Server, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/bad\xff.png"
    Path(os.fsdecode(path)).write_bytes(GOOD)
    with Client(server.base_url) as client:
        assert client.segment(os.fsdecode(path))["images"][0]["file_name"] == "bad\ufffd.png"


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 504])
def test_it_does_not_insist(waits: list[float], status: int) -> None:
    with Client("http://test", transport=httpx.MockTransport(answers(status))) as client:
        with pytest.raises(SegmentError, match=str(status)):
            client.segment(b"x")
    assert not waits


def test_it_does_not_wait_longer_than_it_may(waits: list[float]) -> None:
    with Client("http://test", timeout_s=5, transport=httpx.MockTransport(answers(429))) as client:
        with pytest.raises(SegmentError, match="429 queue_full"):
            client.segment(b"x")
    late = httpx.MockTransport(answers(httpx.ReadTimeout("late")))
    with Client("http://test", transport=late) as client, pytest.raises(SegmentError, match="unreachable"):
        client.segment(b"x")
    assert not waits


def test_an_answer_of_something_in_between(waits: list[float]) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="<html>bad gateway</html>"))
    with Client("http://test", transport=transport) as client, pytest.raises(SegmentError, match="502 unknown"):
        client.segment(b"x")


class RawServer(socketserver.ThreadingTCPServer):
    """Answers whatever is asked with the same bytes, piece by piece."""

    def __init__(self, pieces: list[bytes], pause_s: float) -> None:
        super().__init__(("127.0.0.1", 0), RawAnswer)
        self.pieces, self.pause_s = pieces, pause_s
        self.asked: list[str] = []
        self.stopped = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class RawAnswer(http.server.BaseHTTPRequestHandler):
    server: RawServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client has given up
            for piece in self.server.pieces:
                self.wfile.write(piece)
                if self.server.stopped.wait(self.server.pause_s):
                    return

    do_GET = do_POST

    def log_message(self, format: str, *values: Any) -> None:
        pass


@contextlib.contextmanager
def raw(*pieces: bytes, pause_s: float = 0.0) -> Iterator[RawServer]:
    with RawServer(list(pieces), pause_s) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()


def head(status: int, length: int, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d Said" % status, b"Content-Length: %d" % length, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def synchronously(url: str, call: str, *arguments: Any, timeout_s: float = 60.0, **options: Any) -> Any:
    with Client(url, timeout_s=timeout_s) as client:
        return getattr(client, call)(*arguments, **options)


def asynchronously(url: str, call: str, *arguments: Any, timeout_s: float = 60.0, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, timeout_s=timeout_s) as client:
            return await getattr(client, call)(*arguments, **options)

    return asyncio.run(ask())


both_ways = pytest.mark.parametrize("ask", [synchronously, asynchronously])
CALLS = [("segment", b"x"), ("draw", b"x"), ("models",)]
every_call = pytest.mark.parametrize("call", CALLS, ids=[call[0] for call in CALLS])
SLOW = {
    "body": [head(200, 100), *[b" "] * 100],
    "headers": [bytes([letter]) for letter in head(200, 100)],
    "a byte and no more": [head(200, 100), b" ", *[b""] * 100],
    "refusal": [head(503, 100, b"Retry-After: 0"), *[b" "] * 100],
}


@both_ways
@pytest.mark.parametrize(
    ("slow", "call"), [*((slow, CALLS[0]) for slow in SLOW), *(("body", call) for call in CALLS[1:])]
)
def test_a_call_ends_in_time(ask: Callable[..., Any], call: tuple, slow: str) -> None:
    with raw(*SLOW[slow], pause_s=0.1) as server:  # all of it takes 4 s and more
        begun = time.monotonic()
        with pytest.raises(SegmentError, match=r"^unreachable: no whole answer .* within 0\.4 s") as caught:
            ask(server.url, *call, timeout_s=0.4)
        assert 0.4 <= time.monotonic() - begun < 2
    assert caught.value.status == 0 and server.asked


def test_a_call_that_ended_leaves_no_thread() -> None:
    with raw(*SLOW["body"], pause_s=0.1) as server, Client(server.url, timeout_s=0.4) as client:
        with pytest.raises(SegmentError, match="unreachable"):
            client.segment(b"x")
        for thread in [one for one in threading.enumerate() if one.name == "dsg-client"]:
            thread.join(2)  # the server would go on for 9 s
            assert not thread.is_alive()


ODD = {
    "page of a proxy": (200, b"<html>\nSign in</html>", b"Content-Type: text/html"),
    "no text": (200, b"\xff\xfe\xfd", b"Content-Type: application/json"),
    "nothing": (204, b"", b"Server: a"),
    "other document": (200, b'{"status": "ok"}', b"Content-Type: application/json"),
    "list": (200, b"[1]", b"Content-Type: application/json"),
    "nested": (200, b"[" * 100_000, b"Content-Type: application/json"),
    "no gzip": (200, b"nonsense", b"Content-Encoding: gzip"),
    "half a gzip": (200, gzip.compress(b'{"annotations": [], "models": []}')[:-12], b"Content-Encoding: gzip"),
    "refusal, no gzip": (503, b"nonsense", b"Content-Encoding: gzip\r\nRetry-After: 99"),
    "redirection": (302, b"", b"Location: /elsewhere"),
    "other problem": (403, b'{"reason": 1, "detail": {"a": 2}}', b"Content-Type: application/json"),
}


@both_ways
@every_call
@pytest.mark.parametrize("odd", ODD)
def test_an_answer_that_is_not_the_services(ask: Callable[..., Any], call: tuple, odd: str) -> None:
    status, body, header = ODD[odd]
    with raw(head(status, len(body), header, b"X-Request-Id: abc") + body) as server:
        with pytest.raises(SegmentError, match=f"^{status} unknown: .*: check that the url leads to it") as caught:
            ask(server.url, *call)
    assert (caught.value.status, caught.value.request_id) == (status, "abc")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@both_ways
@pytest.mark.parametrize("told", ["²", "٣", "-1", "1e3", "9" * 5000, "Wed, 21 Oct 2065 07:28:00 GMT", "Wed, 99"])
def test_a_retry_after_that_is_no_number(ask: Callable[..., Any], told: str) -> None:
    body = b'{"reason": "loading", "detail": "soon"}'
    with raw(head(503, len(body), b"Retry-After: " + told.encode()) + body) as server:
        with pytest.raises(SegmentError, match=r"^503 loading: soon"):
            ask(server.url, "segment", b"x", timeout_s=0.2)


@both_ways
@every_call
def test_nobody_there(ask: Callable[..., Any], call: tuple) -> None:
    with raw() as server:
        pass  # its port is closed again
    with pytest.raises(SegmentError, match=f"^unreachable: .*{server.url}.*: check the url") as caught:
        ask(server.url, *call, timeout_s=0.2)
    assert caught.value.status == 0


@both_ways
def test_no_picture_is_sent_nowhere(ask: Callable[..., Any]) -> None:
    with raw() as server:
        for call in ("segment", "draw"):
            for none in ([], ()):
                with pytest.raises(ValueError, match="no picture"):
                    ask(server.url, call, none)
            with pytest.raises(TypeError):
                ask(server.url, call, None)
    assert not server.asked


@both_ways
def test_one_name_and_other_kinds_of_bytes(server: Server, ask: Callable[..., Any]) -> None:
    kinds = [bytearray(GOOD), memoryview(GOOD)]
    for one in [*kinds, kinds]:
        answer = ask(server.base_url, "segment", one, categories="red")
        assert {tuple(each["bbox"]) for each in answer["annotations"]} == {tuple(BOX)}
    assert len(answer["images"]) == 2
    assert ask(server.base_url, "draw", kinds[0]).startswith(b"\x89PNG")
    assert not ask(server.base_url, "segment", GOOD, categories="green")["annotations"]


def test_it_needs_httpx_and_nothing_else() -> None:
    code = "import sys, dsg.service.client; print({'torch', 'fastapi', 'PIL', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
