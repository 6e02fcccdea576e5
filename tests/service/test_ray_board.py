"""The board of replicas, without Ray: it is a class like any other until Ray runs it."""

import asyncio
from importlib.util import find_spec

import pytest

from dsg.service import ray_board

pytestmark = pytest.mark.skipif(find_spec("structlog") is None, reason="the extra serve is not installed")


def test_a_replica_that_died_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answers, one is gone without a word: a reload waits for the first, and for the second no longer than it takes
    to see that it is gone."""
    monkeypatch.setattr(ray_board, "_GONE_S", 0.05)
    monkeypatch.setattr(ray_board, "_LOOK_S", 0.01)
    monkeypatch.setattr(ray_board, "_POLL_S", 0.01)

    async def lives(board: ray_board.Board) -> None:
        while True:
            news = await board.news("alive")
            if news is not None:
                await board.answer("alive", news[0], "done")

    async def ask() -> dict[str, str | None]:
        board = ray_board.Board()
        for name in ("alive", "dead", "asker"):
            assert await board.join(name, []) == []
        listening = asyncio.get_running_loop().create_task(lives(board))
        try:
            return await board.ask("reload", "model", 300.0, without="asker")
        finally:
            listening.cancel()

    assert asyncio.run(ask()) == {"alive": "done"}


def test_one_that_lives_and_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_board, "_LOOK_S", 0.01)

    async def ask() -> dict[str, str | None]:
        board = ray_board.Board()
        await board.join("silent", [])
        return await board.ask("metrics", "", 0.05)

    assert asyncio.run(ask()) == {"silent": None}


def test_a_later_replica_is_told_what_was_loaded() -> None:
    async def names() -> list[str]:
        board = ray_board.Board()
        await board.ask("reload", "second", 1.0)
        return await board.join("late", [])

    assert asyncio.run(names()) == ["second"]
