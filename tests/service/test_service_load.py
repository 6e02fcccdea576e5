"""The load of `dsg bench service`: what it sends and counts, against a real server; what its rows compare."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from service_fakes import Server, encoded, picture, serving

from dsg.bench import service as bench
from dsg.bench.load import Answer, Load, Measured
from dsg.bench.service_processes import Running, Setup, batch_sizes
from dsg.cli.main import run
from dsg.model import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint

PICTURES = [encoded(picture((20, 10, 60, 40), size=(96, size)), "JPEG") for size in (64, 96)]


def port_of(server: Server) -> int:
    assert server.client.base_url.port is not None
    return server.client.base_url.port


async def asking(port: int, path: str, how: str, *given: float) -> Measured:
    async with Load(port, path, PICTURES, deadline_s=30) as load:
        measured: Measured = await getattr(load, how)(*given)
        return measured


def test_open_loop_sends_what_was_meant_and_counts_every_answer() -> None:
    with serving() as server:
        measured = asyncio.run(asking(port_of(server), "/segment", "open", 100, 0.5))
        count = len(measured.answers)
        assert 20 <= count <= 90  # Poisson of 50
        assert {one.status for one in measured.answers} == {200} and measured.rate() == count / 0.5
        assert server.metric("dsg_batch_size_sum") == count
        sizes = batch_sizes(port_of(server))
        assert list(sizes)[:5] == ["1", "2", "3", "4", "5 to 6"] and sum(sizes.values()) > 0
        again = asyncio.run(asking(port_of(server), "/segment", "open", 100, 0.5))
        assert len(again.answers) == count  # the same arrivals for every server


def test_closed_loop_and_failures() -> None:
    with serving() as server:
        measured = asyncio.run(asking(port_of(server), "/segment", "closed", 4, 0.3))
        assert len(measured.answers) >= 4 and measured.share(200) == 1
        assert asyncio.run(asking(port_of(server), "/missing", "closed", 1, 0.05)).share(404) == 1
        port = port_of(server)
    gone = asyncio.run(asking(port, "/segment", "open", 50, 0.2))
    assert gone.share(0) == 1 and gone.rate() == 0 and gone.percentile(0.99) == 0


def test_a_connection_that_the_server_closed_while_it_was_idle_is_not_used() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"--b--")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def ask_twice() -> list[Answer]:
        async with await asyncio.start_server(once, "127.0.0.1", 0) as server:
            async with Load(server.sockets[0].getsockname()[1], "/", PICTURES, deadline_s=30) as load:
                first = await load._ask(load._requests[0], 0.0)
                while not load._idle[0][0].at_eof():
                    await asyncio.sleep(0)
                return [first, await load._ask(load._requests[0], 0.0)]

    assert [one.status for one in asyncio.run(ask_twice())] == [200, 200]


def test_what_the_load_itself_was_late_for_is_told_apart() -> None:
    async def late(port: int) -> Answer:
        async with Load(port, "/segment", PICTURES, deadline_s=30) as load:
            return await load._ask(load._requests[0], time.perf_counter() - 5)

    with serving() as server:
        answer = asyncio.run(late(port_of(server)))
        assert answer.status == 200 and 5 <= answer.late_s <= answer.seconds < 10
        measured = asyncio.run(asking(port_of(server), "/segment", "closed", 1, 0.05))
        assert all(0 <= one.late_s < one.seconds for one in measured.answers)


def test_percentiles_goodput_and_shares_by_hand() -> None:
    answers = [Answer(200, 0.1 * number) for number in range(1, 11)] + [Answer(429, 0.01), Answer(504, 2.0)]
    measured = Measured(answers, seconds=2.0)
    assert measured.percentile(0.5) == pytest.approx(0.6)
    assert measured.percentile(0.99) == pytest.approx(1.0)
    assert measured.rate() == 5 and measured.rate(0.45) == 2
    assert measured.share(429, 503) == pytest.approx(1 / 12)


def test_pictures_are_of_the_sizes_that_are_named(tmp_path: Path) -> None:
    sizes = {Image.open(bench.io.BytesIO(data)).size for data in bench.make_pictures(bench.ONE_SIZE, None)}
    assert sizes == {(1333, 800)}
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    sizes = {Image.open(bench.io.BytesIO(data)).size for data in bench.make_pictures(bench.MIXED, tmp_path)}
    assert {(640, 480), (480, 640), (1920, 1080)} <= sizes
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match="has no"):
        bench.make_pictures(bench.MIXED, tmp_path)


def test_rows_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")

    @contextlib.contextmanager
    def started(what: str, setup: Setup, deadline_s: float) -> Iterator[Running]:
        assert setup.proposals == 7
        yield Running(port_of(server), ready_s=2.0, process_id=0)

    monkeypatch.setattr(bench, "serving", started)
    monkeypatch.setattr(bench, "_CLIENTS", (1,))
    monkeypatch.setattr(bench, "_WARM_UP", (1,))
    monkeypatch.setattr(bench, "_LOADS", (1.0,))
    monkeypatch.setattr(bench, "in_process", lambda setup, pictures, seconds: (50.0, 0.02))
    monkeypatch.setattr(bench, "make_pictures", lambda name, images: PICTURES)
    out = tmp_path / "service.json"
    assert run(f"bench service --out {out} --device cpu --seconds 0.5 --beside litserve --proposals 7".split()) == 0
    document = json.loads(out.read_text())
    cases = [row["case"] for row in document["rows"]]
    for wanted in (
        "800x1333: dsg, throughput with 1 clients; baseline the model without a server",
        "litserve, one client, throughput times median; less if stalled",
        "dsg, from start to ready",
        "goodput within 0.2 s; baseline LitServe",
        "p99 latency; baseline one picture",
        "35.0 requests/s",
        "70 % of the model without a server",
        "requests, p99 latency; baseline 3 times the median of one client",
        "latest that one was sent; baseline that p99",
        " requests/s, 100 % of its best",
        "share shed",
        "batches of 1; baseline all batches",
    ):
        assert any(wanted in case for case in cases), wanted
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    for given, why in (("nosuch", "no weights 'nosuch'"), (str(tmp_path / "a.safetensors"), "a.safetensors")):
        out = tmp_path / "service.json"
        assert run(f"bench service --out {out} --model {given} --device cpu --seconds 0.5".split()) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("dsg: error: ") and why in said and "Error" not in said and not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_servers_really_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    monkeypatch.setattr(bench, "_CLIENTS", (1, 2))
    monkeypatch.setattr(bench, "_WARM_UP", (2,))
    path = tmp_path / "tiny.safetensors"
    info = CheckpointInfo("tiny", "dsg_lite0_fpn", {}, (Category(1, "thing"),), Resize(64, 96), score_threshold=0.5)
    save_checkpoint(path, build("dsg_lite0_fpn", 1), info)
    out = tmp_path / "service.json"
    assert run(f"bench service --out {out} --model {path} --device cpu --seconds 1 --proposals 20".split()) == 0
    rows = {row["case"]: row["value"] for row in json.loads(out.read_text())["rows"]}
    for what in ("dsg", "litserve", "plain"):
        assert rows[f"mixed sizes: {what}, throughput with 2 clients; baseline the model without a server"] > 0
