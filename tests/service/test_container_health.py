"""The health check of containers, against a real server."""

import os
import signal

import pytest
from service_fakes import Server, encoded, picture, serving

from dsg.service.health import main

GOOD = encoded(picture((20, 10, 60, 40)))


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What would have been killed."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append((pid, number)))
    return found


def check(server: Server, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("DSG_PORT", str(server.client.base_url.port))
    return main([*arguments])


def test_a_server_that_takes_pictures_is_healthy(
    server: Server, monkeypatch: pytest.MonkeyPatch, kills: list[tuple[int, int]]
) -> None:
    assert check(server, monkeypatch, "--end-unhealthy") == 0 and not kills


def test_only_one_that_must_be_restarted_is_ended(
    monkeypatch: pytest.MonkeyPatch, kills: list[tuple[int, int]]
) -> None:
    with serving() as server:
        server.service._warm = False  # as while models load
        assert check(server, monkeypatch, "--end-unhealthy") == 1 and not kills
        server.service._warm = True
        server.predictor.failure = lambda prepared: RuntimeError("CUDA error: an illegal memory access was encountered")
        assert server.post(GOOD).status_code == 503
        assert check(server, monkeypatch) == 1 and not kills
        assert check(server, monkeypatch, "--end-unhealthy") == 1
        assert kills == [(1, signal.SIGTERM)]


def test_no_server_is_unhealthy(monkeypatch: pytest.MonkeyPatch, kills: list[tuple[int, int]]) -> None:
    with serving() as server:
        pass
    assert check(server, monkeypatch, "--end-unhealthy") == 1 and not kills
