"""The client against a real server, and against answers made up here where a server would have to be broken."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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
    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(to_thread=asyncio.to_thread, sleep=sleep))
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


def test_it_needs_httpx_and_nothing_else() -> None:
    code = "import sys, dsg.service.client; print({'torch', 'fastapi', 'PIL', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
