"""A client of the service, for programs: waits and asks again as the server tells it to. Needs httpx and nothing else.

from dsg.service.client import Client

with Client("http://127.0.0.1:8000") as client:
    answer = client.segment("photo.jpg", score_threshold=0.3)
"""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import httpx

from dsg.service.client_call import MODELS, SEGMENT, Answer, Call, Picture, Pictures, SegmentError
from dsg.service.client_target import Target

__all__ = ["AsyncClient", "Client", "MaskFormat", "Picture", "SegmentError"]

MaskFormat = Literal["rle", "polygon", "none"]

_JSON, _PNG = "application/json", "image/png"
# How long an idle connection is used again. The server closes those that are idle for 5 s, and what is sent into one as
# it closes is lost; httpx's own bound is 5 s, too.
_IDLE_S = 2.0


class Client:
    """Asks a server, and asks again while it is busy or restarting.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        key: one of the server's `DSG_API_KEYS`, where it wants one.
        timeout_s: seconds that one call may take in all, waiting and asking again included.
        transport: of httpx; None is the network.

    Raises:
        ValueError: a url, a key or a time that can't be. A client that was closed raises RuntimeError.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._target = Target(url, key, timeout_s)
        limits = httpx.Limits(keepalive_expiry=_IDLE_S)
        self._http = httpx.Client(**self._target.http, transport=transport, limits=limits)

    def segment(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        mask_format: MaskFormat | None = None,
        categories: Sequence[str] | None = None,
        model: str | None = None,
    ) -> dict[str, Any]:
        """The instances in one or more pictures: a COCO document, as `POST /segment` answers.

        Args:
            pictures: one, or a sequence of them.
            score_threshold, max_detections, mask_format, model: as docs/service.md has them; None is the server's.
            categories: names; a string is one name, or several with commas between them.

        Raises:
            SegmentError: the server refuses, or does not answer in time, or what answers is not the service.
            OSError: a picture that cannot be read.
            ValueError: no picture. Nothing is sent.
        """
        query = _query(score_threshold, max_detections, mask_format, categories, model)
        return self._ask(SEGMENT, pictures, query).document("annotations")

    def draw(self, picture: Picture, *, score_threshold: float | None = None, model: str | None = None) -> bytes:
        """One picture with its masks drawn on it, a PNG. Raises what `segment` raises."""
        query = {"score_threshold": score_threshold, "model": model}
        return self._ask(SEGMENT, picture, query, _PNG).png()

    def models(self) -> list[dict[str, Any]]:
        """What the server has, the default first. Asks once. Raises SegmentError."""
        return self._ask(MODELS, (), {}).document("models")["models"]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, url: str, pictures: Pictures, query: dict[str, Any], accept: str = _JSON) -> Answer:
        return Call(self._target, url, pictures, query, accept).run(self._insist)

    def _insist(self, call: Call) -> Answer:
        while True:
            try:
                answer = self._ask_once(call)
            except httpx.TransportError as failure:
                wait_s = call.wait_after_failure(failure)
            else:
                if httpx.codes.is_success(answer.status):
                    return answer
                wait_s = call.wait_after(answer)
            time.sleep(wait_s)

    def _ask_once(self, call: Call) -> Answer:
        with self._http.stream(**call.options()) as response:
            try:
                body = b"".join(call.in_time(response.iter_bytes()))
            except httpx.DecodingError as failure:
                return Answer(response.status_code, response.headers, fault=f"{failure}")
            return Answer(response.status_code, response.headers, body)


class AsyncClient:
    """`Client`, for asyncio: the same arguments, and the same calls to be awaited, in one event loop."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        max_connections: int = 100,
    ) -> None:
        self._target = Target(url, key, timeout_s)
        limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=_IDLE_S
        )
        self._http = httpx.AsyncClient(**self._target.http, transport=transport, limits=limits)

    async def segment(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        mask_format: MaskFormat | None = None,
        categories: Sequence[str] | None = None,
        model: str | None = None,
    ) -> dict[str, Any]:
        """As `Client.segment`."""
        query = _query(score_threshold, max_detections, mask_format, categories, model)
        return (await self._ask(SEGMENT, pictures, query)).document("annotations")

    async def draw(self, picture: Picture, *, score_threshold: float | None = None, model: str | None = None) -> bytes:
        """As `Client.draw`."""
        query = {"score_threshold": score_threshold, "model": model}
        return (await self._ask(SEGMENT, picture, query, _PNG)).png()

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return (await self._ask(MODELS, (), {})).document("models")["models"]

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _ask(self, url: str, pictures: Pictures, query: dict[str, Any], accept: str = _JSON) -> Answer:
        call = await asyncio.to_thread(Call, self._target, url, pictures, query, accept)
        try:
            async with asyncio.timeout(call.left_s()):
                return await self._insist(call)
        except TimeoutError as failure:
            raise call.late() from failure

    async def _insist(self, call: Call) -> Answer:
        while True:
            try:
                answer = await self._ask_once(call)
            except httpx.TransportError as failure:
                wait_s = call.wait_after_failure(failure)
            else:
                if httpx.codes.is_success(answer.status):
                    return answer
                wait_s = call.wait_after(answer)
            await asyncio.sleep(wait_s)

    async def _ask_once(self, call: Call) -> Answer:
        async with self._http.stream(**call.options()) as response:
            try:
                body = await response.aread()
            except httpx.DecodingError as failure:
                return Answer(response.status_code, response.headers, fault=f"{failure}")
            return Answer(response.status_code, response.headers, body)


def _query(
    score_threshold: float | None,
    max_detections: int | None,
    mask_format: MaskFormat | None,
    categories: Sequence[str] | None,
    model: str | None,
) -> dict[str, Any]:
    return {
        "score_threshold": score_threshold,
        "max_detections": max_detections,
        "mask_format": mask_format,
        "categories": categories if categories is None or isinstance(categories, str) else ",".join(categories),
        "model": model,
    }
