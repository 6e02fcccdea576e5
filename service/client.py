"""A client of the service, for programs: waits and asks again as the server tells it to. Needs httpx and nothing else.

from dsg.service.client import Client

with Client("http://127.0.0.1:8000") as client:
    answer = client.segment("photo.jpg", score_threshold=0.3)
"""

import asyncio
import random
import time
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx

Picture = str | PathLike[str] | bytes
"""A path, or a file's bytes: JPEG, PNG, WebP, BMP or TIFF."""
MaskFormat = Literal["rle", "polygon", "none"]

_ASK_AGAIN = frozenset({429, 503})
_FIRST_PAUSE_S = 0.25  # where the server does not say how long; doubles each time ...
_LONGEST_PAUSE_S = 10.0  # ... up to this
_JITTER = 0.25  # waits are up to this share longer, so that those refused together do not come back together
# How long an idle connection is used again. The server closes those that are idle for 5 s, and what is sent into one as
# it closes is lost; httpx's own bound is 5 s, too.
_IDLE_S = 2.0


class SegmentError(Exception):
    """The server's refusal, or that it was not reached in time.

    Attributes:
        status: HTTP status; 0 where no answer came.
        reason: one word, as docs/service.md lists them; `unreachable` where no answer came.
        detail: one sentence.
        index: which picture of the request is at fault, counted from 0, or None.
        request_id: what the server's log has it under, or "".
    """

    def __init__(self, status: int, reason: str, detail: str, index: int | None = None, request_id: str = "") -> None:
        super().__init__(f"{status} {reason}: {detail}" if status else f"{reason}: {detail}")
        self.status = status
        self.reason = reason
        self.detail = detail
        self.index = index
        self.request_id = request_id


class _Asking:
    """One request: what is sent, and what follows from each answer."""

    def __init__(self, pictures: Picture | Sequence[Picture], query: dict[str, Any], accept: str, timeout_s: float):
        several = pictures if isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes) else [pictures]
        self._parts = [("image", _part(one, number)) for number, one in enumerate(several)]
        self._query = {name: value for name, value in query.items() if value is not None}
        self._accept = accept
        self._give_up = time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S

    def options(self) -> dict[str, Any]:
        """Of httpx's `post`."""
        left_s = max(0.001, self._give_up - time.monotonic())
        headers = {"Accept": self._accept, "X-Timeout-Ms": str(max(1, round(left_s * 1000)))}
        return {"params": self._query, "files": self._parts, "headers": headers, "timeout": left_s}

    def wait_after(self, response: httpx.Response) -> float:
        """Seconds to wait before asking again. Raises `SegmentError` where asking again is of no use."""
        error = _error(response)
        if response.status_code not in _ASK_AGAIN:
            raise error
        told = response.headers.get("retry-after", "")
        return self._wait(float(told) if told.isdigit() else None, error)

    def wait_after_failure(self, failure: httpx.TransportError) -> float:
        """The same where no answer came."""
        error = SegmentError(0, "unreachable", f"{type(failure).__name__}: {failure}")
        if not isinstance(failure, httpx.ConnectError | httpx.RemoteProtocolError | httpx.ReadError):
            raise error from failure
        return self._wait(None, error)

    def _wait(self, told_s: float | None, error: SegmentError) -> float:
        if told_s is None:
            told_s = self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        wait_s = told_s * (1 + _JITTER * random.random())
        if time.monotonic() + wait_s >= self._give_up:
            raise error
        return wait_s


class _Settings:
    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.http: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
        }


class Client:
    """Asks a server, and asks again while it is busy or restarting.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        key: one of the server's `DSG_API_KEYS`, where it wants one.
        timeout_s: seconds that one call may take in all, waiting and asking again included.
        transport: of httpx; None is the network.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._settings = _Settings(url, key, timeout_s)
        limits = httpx.Limits(keepalive_expiry=_IDLE_S)
        self._http = httpx.Client(**self._settings.http, transport=transport, limits=limits)

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

        Raises:
            SegmentError: the server refuses, or does not answer in time.
            OSError: a picture that cannot be read.
        """
        query = _query(score_threshold, max_detections, mask_format, categories, model)
        document: dict[str, Any] = self._ask(pictures, query, "application/json").json()
        return document

    def draw(self, picture: Picture, *, score_threshold: float | None = None, model: str | None = None) -> bytes:
        """One picture with its masks drawn on it, a PNG. Raises what `segment` raises."""
        return self._ask(picture, {"score_threshold": score_threshold, "model": model}, "image/png").content

    def models(self) -> list[dict[str, Any]]:
        """What the server has, the default first. Raises SegmentError, httpx.TransportError."""
        return _models(self._http.get("/models", timeout=self._settings.timeout_s))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, pictures: Picture | Sequence[Picture], query: dict[str, Any], accept: str) -> httpx.Response:
        asking = _Asking(pictures, query, accept, self._settings.timeout_s)
        while True:
            try:
                response = self._http.post("/segment", **asking.options())
            except httpx.TransportError as failure:
                wait_s = asking.wait_after_failure(failure)
            else:
                if response.is_success:
                    return response
                wait_s = asking.wait_after(response)
            time.sleep(wait_s)


class AsyncClient:
    """`Client`, for asyncio: the same arguments, and the same calls to be awaited."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        max_connections: int = 100,
    ) -> None:
        self._settings = _Settings(url, key, timeout_s)
        limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=_IDLE_S
        )
        self._http = httpx.AsyncClient(**self._settings.http, transport=transport, limits=limits)

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
        document: dict[str, Any] = (await self._ask(pictures, query, "application/json")).json()
        return document

    async def draw(self, picture: Picture, *, score_threshold: float | None = None, model: str | None = None) -> bytes:
        """As `Client.draw`."""
        query = {"score_threshold": score_threshold, "model": model}
        return (await self._ask(picture, query, "image/png")).content

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return _models(await self._http.get("/models", timeout=self._settings.timeout_s))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _ask(self, pictures: Picture | Sequence[Picture], query: dict[str, Any], accept: str) -> httpx.Response:
        asking = await asyncio.to_thread(_Asking, pictures, query, accept, self._settings.timeout_s)
        while True:
            try:
                response = await self._http.post("/segment", **asking.options())
            except httpx.TransportError as failure:
                wait_s = asking.wait_after_failure(failure)
            else:
                if response.is_success:
                    return response
                wait_s = asking.wait_after(response)
            await asyncio.sleep(wait_s)


def _part(picture: Picture, number: int) -> tuple[str, bytes]:
    if isinstance(picture, bytes):
        return f"{number}", picture
    return Path(picture).name, Path(picture).read_bytes()


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
        "categories": None if categories is None else ",".join(categories),
        "model": model,
    }


def _models(response: httpx.Response) -> list[dict[str, Any]]:
    if not response.is_success:
        raise _error(response)
    models: list[dict[str, Any]] = response.json()["models"]
    return models


def _error(response: httpx.Response) -> SegmentError:
    request_id = response.headers.get("x-request-id", "")
    try:
        problem = response.json()
        reason, detail, index = problem["reason"], problem["detail"], problem.get("index")
    except (ValueError, KeyError, TypeError):  # something between here and the service answered
        reason, detail, index = "unknown", response.text[:200], None
    return SegmentError(response.status_code, reason, detail, index, request_id)
