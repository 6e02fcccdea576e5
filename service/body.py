"""Request bodies: read within limits of bytes and time, taken apart into pictures. Nothing goes to disk."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from dsg.service.problems import CLIENT_GONE, Problem, deadline_passed, too_many_bytes

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

RAW_TYPES = frozenset(
    f"image/{name}" for name in ("jpeg", "jpg", "pjpeg", "png", "webp", "bmp", "x-bmp", "x-ms-bmp", "tiff", "x-tiff")
)
"""Content types of a raw body; which of them it is, its bytes say."""
_FIELD = "image"
_CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Upload:
    """One file of a request."""

    name: str
    """As the client calls it; only ever repeated to the client."""
    data: bytes


async def read_body(
    request: Request,
    max_bytes: int,
    timeout_s: float,
    deadline: float = math.inf,
    taken: Callable[[int], None] = lambda count: None,
) -> bytes:
    """The whole body.

    Args:
        request: whose body has not been read yet.
        max_bytes: cap of its size.
        timeout_s: cap of the time that it may take from now.
        deadline: of the request, on the clock of `time.monotonic`.
        taken: told how many bytes came each time; may refuse them with a `Problem`.

    Raises:
        Problem: 413 more than `max_bytes`, declared or sent; 408 not complete within `timeout_s`, or 504 by
            `deadline`, whichever comes first; 499 hung up; what `taken` raised.
    """
    left_s = max(0.0, deadline - time.monotonic())
    declared = request.headers.get("content-length", "")
    too_many = too_many_bytes(max_bytes)
    refusal = too_many if declared.isdigit() and int(declared[:20]) > max_bytes else None
    chunks: list[bytes] = []
    size = 0
    # A client that asks first ("Expect: 100-continue") has not sent anything yet; reading would invite it to.
    if not (refusal and "expect" in request.headers):
        try:
            async with asyncio.timeout(min(timeout_s, left_s)):
                async for chunk in request.stream():
                    size += len(chunk)
                    if refusal is None:
                        refusal = too_many if size > max_bytes else _refusal(taken, len(chunk))
                    if refusal is None:
                        chunks.append(chunk)
                    elif size > 2 * max_bytes:
                        break
                    else:
                        # Read on for a while and keep nothing: most clients look for an answer only once they
                        # have sent all, and a connection closed before that shows them an error in place of
                        # the answer.
                        chunks.clear()
        except TimeoutError:
            if refusal is None and left_s <= timeout_s:
                raise deadline_passed(_CLOSE) from None
            if refusal is None:
                detail = f"the body did not arrive within {timeout_s:g} s; send it faster, or less of it"
                raise Problem(408, "slow_sender", detail, _CLOSE) from None
        except ClientDisconnect:
            raise Problem(CLIENT_GONE, "client_gone", "the client hung up while sending") from None
    if refusal is not None:
        raise refusal
    return b"".join(chunks)


def _refusal(taken: Callable[[int], None], count: int) -> Problem | None:
    try:
        taken(count)
    except Problem as problem:
        problem.headers |= _CLOSE
        return problem
    return None


def picture_type(request: Request) -> str:
    """Content type of a request with pictures, without parameters. Raises the 415 problem for any other."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Problem(415, "unsupported_encoding", f"Content-Encoding {encoding} is not taken; send the file as it is")
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "multipart/form-data" and content_type not in RAW_TYPES:
        detail = f"a body of type {content_type or '(none)'} is not taken; send parts named '{_FIELD}' as"
        raise Problem(415, "unsupported_type", f"{detail} multipart/form-data, or a file with its image/... type")
    return content_type


def split_body(content_type_header: str, body: bytes, max_pictures: int) -> list[Upload]:
    """Pictures of a body, in their order.

    Args:
        content_type_header: with its parameters; a type that `picture_type` lets through.
        body: all of it.
        max_pictures: cap of parts.

    Raises:
        Problem: 400 broken multipart; 422 a part of another name, no part at all, or too many.
    """
    content_type, options = parse_options_header(content_type_header)
    if content_type != b"multipart/form-data":
        return [Upload("image", body)]
    collector = _Parts(max_pictures)
    try:
        parser = MultipartParser(options.get(b"boundary", b""), collector.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError):
        raise _broken_multipart() from None
    if not collector.complete:
        raise _broken_multipart()
    if not collector.uploads:
        raise Problem(422, "no_picture", f"no part is named '{_FIELD}'; send one for each picture")
    return collector.uploads


def _broken_multipart() -> Problem:
    return Problem(400, "broken_multipart", "the multipart body is broken or cut short, or its boundary is missing")


class _Parts:
    """What python-multipart's parser calls back."""

    def __init__(self, max_pictures: int) -> None:
        self.uploads: list[Upload] = []
        self.complete = False
        self._max_pictures = max_pictures
        self._field = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._data: bytes | bytearray = b""
        self._name = ""

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._headers,
            "on_part_data": self._piece,
            "on_part_end": lambda: self.uploads.append(Upload(self._name, bytes(self._data))),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = b""
        self._data = b""

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != _FIELD:
            detail = f"a part is named {field[:80]!r}; pictures are '{_FIELD}', all else is query"
            raise Problem(422, "wrong_part", detail)
        if len(self.uploads) == self._max_pictures:
            detail = f"more than {self._max_pictures} pictures in one request; send the rest in another"
            raise Problem(422, "too_many_pictures", detail)
        self._name = options.get(b"filename", b"").decode("utf-8", "replace") or _FIELD

    def _piece(self, data: bytes, start: int, end: int) -> None:
        if not self._data:
            self._data = data[start:end]  # nearly always all of a file, which is copied once then
            return
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        self._data += memoryview(data)[start:end]

    def _end(self) -> None:
        self.complete = True
