"""One call of the Python client: what it sends, how long it may take, and what follows from each answer."""

import concurrent.futures
import contextvars
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from os import PathLike
from pathlib import Path
from typing import Any

import httpx

from dsg.service.client_target import Target

Picture = str | PathLike[str] | bytes | bytearray | memoryview
"""A path, or a file's bytes: JPEG, PNG, WebP, BMP or TIFF."""
Pictures = Picture | Sequence[Picture]
SEGMENT, MODELS = "/segment", "/models"

_ASK_AGAIN = frozenset({429, 503})
_FIRST_PAUSE_S = 0.25  # where the server does not say how long; doubles each time ...
_LONGEST_PAUSE_S = 10.0  # ... up to this
_JITTER = 0.25  # waits are up to this share longer, so that those refused together do not come back together


class SegmentError(Exception):
    """The server's refusal, or that no answer of it came in time.

    Attributes:
        status: HTTP status; 0 where no answer came, or not all of it in time.
        reason: one word, as docs/service.md lists them; `unreachable` where the status is 0, `unknown` where what
            answered is not the service.
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


@dataclass(frozen=True)
class Answer:
    """What came back, from whatever it was that answered."""

    status: int
    headers: httpx.Headers
    body: bytes = b""
    fault: str = ""  # why there is no body

    def document(self, name: str) -> dict[str, Any]:
        """What is in it, a list of this name among others."""
        content = _parsed(self.body)
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise self.unknown()
        return content

    def png(self) -> bytes:
        if not self.body.startswith(b"\x89PNG\r\n\x1a\n"):
            raise self.unknown()
        return self.body

    def refusal(self) -> SegmentError:
        problem = _parsed(self.body)
        if not isinstance(problem, dict) or not all(isinstance(problem.get(key), str) for key in ("reason", "detail")):
            return self.unknown()
        request_id = self.headers.get("x-request-id", "")
        return SegmentError(self.status, problem["reason"], problem["detail"], problem.get("index"), request_id)

    def unknown(self) -> SegmentError:
        """That something between here and the service answered, or broke its answer."""
        begin = self.body[:200].decode(errors="replace")
        said = self.fault or f"{self.headers.get('content-type', 'no type')}, {begin!r}"
        detail = f"not an answer of the service ({said}): check that the url leads to it, and any proxy in between"
        return SegmentError(self.status, "unknown", detail, request_id=self.headers.get("x-request-id", ""))


class Call:
    """One call; made before its first request, used by one thread or task at a time."""

    def __init__(self, target: Target, url: str, pictures: Pictures, query: dict[str, Any], accept: str) -> None:
        self._target = target
        self._give_up = time.monotonic() + target.timeout_s
        self._insists = url == SEGMENT
        self._accept = accept
        self._pause_s = _FIRST_PAUSE_S
        self._sent: dict[str, Any] = {"method": "GET", "url": url}
        if url == SEGMENT:
            parts = [("image", _part(one, number)) for number, one in enumerate(_several(pictures))]
            params = {name: value for name, value in query.items() if value is not None}
            self._sent = {"method": "POST", "url": url, "params": params, "files": parts}

    def left_s(self) -> float:
        """How long it may still take. Raises `SegmentError` where that is over."""
        left_s = self._give_up - time.monotonic()
        if left_s <= 0:
            raise self.late()
        return left_s

    def late(self) -> SegmentError:
        detail = f"no whole answer from {self._target.url} within {self._target.timeout_s:g} s: raise timeout_s"
        return SegmentError(0, "unreachable", f"{detail}, or look what holds the server up")

    def options(self) -> dict[str, Any]:
        """Of httpx's `stream`."""
        left_s = self.left_s()
        headers = {"Accept": self._accept, "X-Timeout-Ms": str(max(1, round(left_s * 1000)))}
        return {**self._sent, "headers": headers, "timeout": left_s}

    def in_time(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The same, up to the end of the call."""
        for chunk in chunks:
            self.left_s()
            yield chunk

    def run(self, ask: Callable[["Call"], Answer]) -> Answer:
        """What `ask` returns or raises, or `late` when the call's time is over.

        On a thread, since httpx bounds each read, but not all of them together, nor the look-up of a name. One that was
        given up ends with the next chunk of the body or when a read takes too long; no program waits for it to exit.
        """
        answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

        def work() -> None:
            try:
                answer.set_result(ask(self))
            except BaseException as failure:  # of whatever kind: it is raised where the call was made
                answer.set_exception(failure)

        context = contextvars.copy_context()  # what traces requests looks there
        threading.Thread(target=context.run, args=(work,), name="dsg-client", daemon=True).start()
        concurrent.futures.wait([answer], timeout=max(0.0, self._give_up - time.monotonic()))
        if not answer.done():
            raise self.late()
        return answer.result()

    def wait_after(self, answer: Answer) -> float:
        """Seconds to wait before asking again. Raises `SegmentError` where asking again is of no use."""
        error = answer.refusal()
        if not self._insists or answer.status not in _ASK_AGAIN:
            raise error
        return self._wait(_seconds(answer.headers.get("retry-after", "")), error)

    def wait_after_failure(self, failure: httpx.TransportError) -> float:
        """The same where no answer came."""
        if isinstance(failure, httpx.TimeoutException):
            raise self.late() from failure
        said = " ".join(f"{type(failure).__name__}: {failure}".split())
        detail = f"no answer from {self._target.url} ({said}): check the url, and that the server runs"
        error = SegmentError(0, "unreachable", detail)
        again = isinstance(failure, httpx.ConnectError | httpx.RemoteProtocolError | httpx.ReadError)
        if not (self._insists and again):
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


def _several(pictures: Pictures) -> Sequence[Picture]:
    # bytes are a sequence as well: of numbers
    if not isinstance(pictures, Sequence) or isinstance(pictures, str | bytes | bytearray | memoryview):
        return [pictures]
    if not pictures:
        raise ValueError("there is no picture to ask about: give a path, the bytes of a file, or a list of those")
    return pictures


def _part(picture: Picture, number: int) -> tuple[str, bytes]:
    if isinstance(picture, bytes | bytearray | memoryview):
        return f"{number}", bytes(picture)
    # A name that is not UTF-8 travels all the same, since the file can be read.
    return os.fsencode(Path(picture).name).decode(errors="replace"), Path(picture).read_bytes()


def _seconds(retry_after: str) -> float | None:
    """What a server says, a number of seconds or a date; None where it is neither."""
    # isascii: other scripts have digits, too, and float() does not read all of them
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
