"""How the replicas of one Ray application reach each other: a board that they ask, and that tells them what was asked.

Ray's proxy gives a request to one replica, and some requests are for all of them: to load a model anew, or to say how
much was done. Serve keeps one `Board` for each deployment, and starts another where it dies; a replica that finds a new
board says again who it is.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

_log = structlog.get_logger("dsg.service")
NAME = "board"
_POLL_S = 5.0  # a replica asks for news at least so often ...
_GONE_S = 15.0  # ... and one that has not for so long is gone
_LOOK_S = 1.0  # how often that is looked at while an answer is waited for
_METRICS_S = 2.0  # a scrape must not wait for a replica that hangs
_RELOAD_S = 300.0


class Board:
    """An actor of Ray; all calls run on one event loop."""

    def __init__(self) -> None:
        self._news: dict[str, asyncio.Queue[tuple[int, str, str]]] = {}
        self._seen: dict[str, float] = {}
        self._answers: dict[tuple[int, str], asyncio.Future[str]] = {}
        self._numbers = itertools.count()
        self._reloaded: dict[str, None] = {}

    async def join(self, replica: str, reloaded: list[str]) -> list[str]:
        """Take a replica in, with what it was told to load; what others were told to load, in their order."""
        self._news.setdefault(replica, asyncio.Queue())
        self._seen[replica] = asyncio.get_running_loop().time()
        self._reloaded.update(dict.fromkeys(reloaded))
        return list(self._reloaded)

    async def news(self, replica: str) -> tuple[int, str, str] | None:
        """Wait for what is asked of a replica, for a while: number, kind, text. KeyError: it must join first."""
        queue = self._news[replica]
        self._seen[replica] = asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(queue.get(), _POLL_S)
        except TimeoutError:
            return None

    async def answer(self, replica: str, number: int, text: str) -> None:
        """What a replica says to what was asked."""
        answer = self._answers.get((number, replica))
        if answer is not None and not answer.done():
            answer.set_result(text)

    async def ask(self, kind: str, text: str, timeout_s: float, without: str = "") -> dict[str, str | None]:
        """Ask all replicas but one; None is no answer in time. Those that are gone, or go meanwhile, are left out."""
        loop = asyncio.get_running_loop()
        self._drop_gone()
        if kind == "reload":
            self._reloaded[text] = None
        number = next(self._numbers)
        waiting = {name: loop.create_future() for name in self._news if name != without}
        self._answers.update({(number, name): future for name, future in waiting.items()})
        for name in waiting:
            self._news[name].put_nowait((number, kind, text))
        asked, end = list(waiting), loop.time() + timeout_s
        while (open_ones := [one for one in waiting.values() if not one.done()]) and (left := end - loop.time()) > 0:
            await asyncio.wait(open_ones, timeout=min(left, _LOOK_S))
            for name in self._drop_gone():
                waiting.pop(name, None)
        for name in asked:
            del self._answers[number, name]
        return {name: future.result() if future.done() else None for name, future in waiting.items()}

    def _drop_gone(self) -> list[str]:
        """Forget the replicas that have not asked for news for too long; their names."""
        now = asyncio.get_running_loop().time()
        gone = [name for name, seen in self._seen.items() if now - seen > _GONE_S]
        for name in gone:
            del self._seen[name], self._news[name]
        return gone


class BoardPeers:
    """A replica's side of the board; `dsg.service.peers.Peers`.

    Args:
        replica: its name.
        board: finds the actor; called anew when it has died.
        metrics: this replica's own, as text.
        reload: has it load a model anew; raises if that fails.
    """

    def __init__(
        self,
        replica: str,
        board: Callable[[], Any],
        metrics: Callable[[], str],
        reload: Callable[[str], Awaitable[object]],
    ) -> None:
        self._replica = replica
        self._find = board
        self._metrics = metrics
        self._reload = reload
        self._reloaded: dict[str, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self) -> list[str]:
        """Join the board and listen; names of models that the others were told to load since they started."""
        reloaded: list[str] = await self._find().join.remote(self._replica, [])
        self._keep(self._listen())
        return reloaded

    async def metrics(self) -> Mapping[str, str]:
        texts: dict[str, str] = {self._replica: self._metrics()}
        try:
            answers = await self._find().ask.remote("metrics", "", _METRICS_S, self._replica)
        except Exception as error:  # the board is being started again; our own numbers are better than none
            _log.warning("no metrics of the other replicas", error=str(error).partition("\n")[0])
            return texts
        return texts | {name: text for name, text in answers.items() if text is not None}

    async def reload(self, name: str) -> list[str]:
        self._reloaded[name] = None
        answers = await self._find().ask.remote("reload", name, _RELOAD_S, self._replica)
        return [replica for replica, answer in answers.items() if answer != "done"]

    async def _listen(self) -> None:
        """Answer what is asked, for ever; join again where the board is a new one."""
        board = self._find()
        while True:
            try:
                news = await board.news.remote(self._replica)
            except Exception:  # it died, or knows us no more
                await asyncio.sleep(1.0)
                try:
                    board = self._find()
                    names = await board.join.remote(self._replica, list(self._reloaded))
                    for name in [name for name in names if name not in self._reloaded]:  # told while it was not heard
                        await self._reload(name)
                        self._reloaded[name] = None
                except Exception as error:
                    _log.warning("no board of the replicas", error=str(error).partition("\n")[0])
                continue
            if news is not None:
                # Beside the listening: a reload takes its time, and scrapes come meanwhile.
                self._keep(self._answer(board, *news))

    async def _answer(self, board: Any, number: int, kind: str, text: str) -> None:
        if kind == "metrics":
            said = self._metrics()
        else:
            try:
                await self._reload(text)
                self._reloaded[text] = None
                said = "done"
            except Exception as error:
                said = f"failed: {error}"
        await board.answer.remote(self._replica, number, said)

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
