"""HTTP on a socket, as uvicorn has it, with bounds in time and bytes on what a client may make it wait for or keep.

Uvicorn itself waits for ever for a client that sends half a header or reads none of its answer, keeps whatever trailers
one sends, takes them for headers, and drops the body of a request that offers another protocol.
"""

import asyncio
from collections.abc import Callable

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LARGEST_HEADERS = 65_536  # bytes
_LEAST_TAKEN = 32_768  # bytes of an answer, each time that it is looked at
_SLOW = (408, b"Request Timeout", "slow_sender", b"the headers did not arrive in time")
_LARGE = (431, b"Request Header Fields Too Large", "large_headers", b"the headers are too large")
_BROKEN = (400, b"Bad Request", "broken_http", b"this is not HTTP, or broken")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


def bounded_protocol(
    header_timeout_s: float, stall_s: float, refused: Callable[[str], None] = lambda reason: None
) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol with bounds.

    Args:
        header_timeout_s: a connection is closed whose headers are not complete after so many seconds, or that sends
            something else for so long where headers are to come.
        stall_s: one is closed that takes next to nothing of its answer for so many seconds.
        refused: told the reason of each request that is answered here, before it is one.
    """

    class Bounded(_BoundedProtocol):
        timeout_s, write_timeout_s, say_refused = header_timeout_s, stall_s, staticmethod(refused)

    return Bounded


class _BoundedProtocol(HttpToolsProtocol):
    timeout_s: float
    write_timeout_s: float
    say_refused: Callable[[str], None]
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _unsent = 0
    _received = 0  # since the last sign that a request goes on: its headers, a piece of its body, its end
    _in_headers = True
    _in_body = False
    _repeating = False  # the headers of a request that is already there

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(*_BROKEN)
            return
        if self._received > _LARGEST_HEADERS:  # of headers, of trailers, or between two pieces of a body
            self._refuse(*_LARGE)
        elif self._timer is None and self.cycle is not None and self.cycle.response_complete:
            # The rest of a body that was answered before its end, or line feeds before the next headers.
            self._expect_headers()

    def on_message_begin(self) -> None:
        if self._repeating:
            return
        super().on_message_begin()
        self._in_headers = True
        if self._timer is None:  # a further request of the connection
            self._expect_headers()

    def on_url(self, url: bytes) -> None:
        if not self._repeating:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are no headers: whoever filters headers before this server has not seen them.
        if self._in_headers and not self._repeating:
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        if self._repeating:
            return
        self._in_headers, self._in_body, self._received = False, True, 0
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _LARGEST_HEADERS:
            self._refuse(*_LARGE)
            raise ValueError("the headers are too large")  # so that the parser stops
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._received = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing():
            return  # the parser has left the body out
        self._in_body, self._received = False, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self._look_at_writing)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*_BROKEN)

    def _decline(self, rest: bytes) -> None:
        """Go on as if the client had not offered another protocol, which any server may."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        framing = self._framing()
        if framing:
            head = b"".join(b"%b: %b\r\n" % header for header in framing)
            self._repeating = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
            self._repeating = False
        if rest:
            self._received -= len(rest)
            self.data_received(rest)

    def _framing(self) -> list[tuple[bytes, bytes]]:
        """The headers that say how a body is sent; none where there is no body."""
        found = [(name, value) for name, value in self.headers if name in _FRAMING]
        return [] if found == [(b"content-length", b"0")] else found

    def _expect_headers(self) -> None:
        self._received = 0
        self._timer = self.loop.call_later(self.timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        # Where another request of the connection is still being answered, its answer must not be mixed with this one.
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._received == 0 or answering or self._in_body:
            self._stop_timer()
            if not answering:
                self.transport.close()
            return
        self._refuse(*_SLOW)

    def _look_at_writing(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent > self._unsent - _LEAST_TAKEN:
            self.transport.abort()
            return
        self._unsent = unsent
        self._write_timer = self.loop.call_later(self.write_timeout_s, self._look_at_writing)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, status: int, title: bytes, reason: str, detail: bytes) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._in_body and self.cycle is not None and self.cycle.response_started:
            self.transport.abort()  # a second answer would be taken for a part of the first
            return
        self.say_refused(reason)
        code = str(status).encode()
        document = b'{"type":"about:blank","title":"%b","status":%b,"reason":"%b","detail":"%b"}'
        document %= (title, code, reason.encode(), detail)
        kind, length = b"content-type: application/problem+json", b"content-length: %d" % len(document)
        lines = (b"HTTP/1.1 " + code + b" " + title, kind, length, b"connection: close", b"", document)
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()
