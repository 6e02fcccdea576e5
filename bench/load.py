"""Load on a server of this machine: open loop (requests come when they come) and closed loop (so many at once).

Open loop is what the world does: arrivals do not wait for answers, and a latency counts from the moment a request was
meant to be sent, so that a server that stalls is not asked less for it (coordinated omission).
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

_HOST = "127.0.0.1"
_GIVE_UP = 4  # deadlines after which a client hangs up


@dataclass(frozen=True)
class Answer:
    """What one request came to."""

    status: int
    """HTTP status; 0 where none came, or not in time."""
    seconds: float
    """From the moment it was meant to be sent to the whole answer."""
    late_s: float = 0.0
    """How long after that moment its client began to send it: the load's own delay, no server's."""


@dataclass(frozen=True)
class Measured:
    """The answers of one measurement."""

    answers: list[Answer]
    seconds: float
    """Time of sending."""

    def percentile(self, share: float) -> float:
        """Latency of successes in seconds that this share of them keeps; 0 where there is none."""
        times = sorted(one.seconds for one in self.answers if one.status == 200)
        return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    def rate(self, deadline_s: float = float("inf")) -> float:
        """Successes within the deadline, a second."""
        return sum(one.status == 200 and one.seconds <= deadline_s for one in self.answers) / self.seconds

    def share(self, *statuses: int) -> float:
        """Share of the answers that has one of these statuses."""
        return sum(one.status in statuses for one in self.answers) / len(self.answers) if self.answers else 0.0


class Load:
    """Clients of one server, all of this machine; `async with` closes their connections.

    Args:
        port: of 127.0.0.1; nothing else is ever asked.
        path: of the endpoint.
        pictures: files; each request sends one, drawn at random.
        deadline_s: of each request; told to servers that know `X-Timeout-Ms`.
        seed: of the draws and arrivals, so that all servers get the same.
    """

    def __init__(self, port: int, path: str, pictures: Sequence[bytes], deadline_s: float, seed: int = 0) -> None:
        self._port = port
        self._requests = [_request(path, picture, deadline_s) for picture in pictures]
        self._deadline_s = deadline_s
        self._seed = seed
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def closed(self, clients: int, seconds: float) -> Measured:
        """So many clients, each with one request after the other, for so long."""
        answers: list[Answer] = []
        begin = time.perf_counter()

        async def client(number: int) -> None:
            chance = random.Random(f"{self._seed} {number}")
            while time.perf_counter() < begin + seconds:
                answers.append(await self._ask(chance.choice(self._requests), time.perf_counter()))

        await asyncio.gather(*map(client, range(clients)))
        return Measured(answers, time.perf_counter() - begin)

    async def open(self, rate: float, seconds: float) -> Measured:
        """Poisson arrivals of so many requests a second on average, for so long."""
        chance = random.Random(self._seed)
        begin = time.perf_counter()
        due = begin
        tasks: list[asyncio.Task[Answer]] = []
        while (due := due + chance.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._ask(chance.choice(self._requests), due)))
        return Measured(list(await asyncio.gather(*tasks)), seconds)

    async def __aenter__(self) -> "Load":
        return self

    async def __aexit__(self, *error: object) -> None:
        for _, writer in self._idle:
            await _close(writer)
        self._idle.clear()

    async def _ask(self, request: bytes, due: float) -> Answer:
        late_s = time.perf_counter() - due
        status = 0
        try:
            async with asyncio.timeout(_GIVE_UP * self._deadline_s):
                status = await self._exchange(request)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            status = 0  # gone, too late, or no HTTP
        return Answer(status, time.perf_counter() - due, late_s)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            await _close(writer)  # servers close what was idle for some seconds
        return await asyncio.open_connection(_HOST, self._port)

    async def _exchange(self, request: bytes) -> int:
        reader, writer = await self._connection()
        keep = False
        try:
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            keep = b"\r\nconnection: close" not in head
            return int(head[9:12])
        finally:
            if keep:
                self._idle.append((reader, writer))
            else:
                await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # the other side was first
        await writer.wait_closed()


def _request(path: str, picture: bytes, deadline_s: float) -> bytes:
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    body += picture + b"\r\n--b--\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {_HOST}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {len(body)}\r\nX-Timeout-Ms: {round(deadline_s * 1000)}\r\n\r\n"
    )
    return head.encode() + body
