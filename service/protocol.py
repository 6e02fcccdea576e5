"""HTTP on a socket, as uvicorn has it, with bounds on a request's headers in time and bytes.

Uvicorn itself waits for ever for a client that sends half a header, and keeps whatever one sends for that long.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LARGEST_HEADERS = 65_536  # bytes
_SLOW = (408, b"Request Timeout", b'"reason":"slow_sender","detail":"the headers did not arrive in time"')
_LARGE = (431, b"Request Header Fields Too Large", b'"reason":"large_headers","detail":"the headers are too large"')


def bounded_protocol(header_timeout_s: float) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol, but a connection is closed whose headers are not complete after so many seconds."""

    class Bounded(_BoundedProtocol):
        timeout_s = header_timeout_s

    return Bounded


class _BoundedProtocol(HttpToolsProtocol):
    timeout_s: float
    _timer: asyncio.TimerHandle | None = None
    _received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self._timer is not None and self._received > _LARGEST_HEADERS:
            self._refuse(*_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:  # a further request of the connection
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

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
        if self._received == 0 or answering:
            self._stop_timer()
            if not answering:
                self.transport.close()
            return
        self._refuse(*_SLOW)

    def _refuse(self, status: int, title: bytes, members: bytes) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        code = str(status).encode()
        document = b'{"type":"about:blank","title":"%b","status":%b,%b}' % (title, code, members)
        kind, length = b"content-type: application/problem+json", b"content-length: %d" % len(document)
        lines = (b"HTTP/1.1 " + code + b" " + title, kind, length, b"connection: close", b"", document)
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, b"Bad Request", b'"reason":"broken_http","detail":"this is not HTTP, or broken"')
