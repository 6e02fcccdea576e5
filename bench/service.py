"""`dsg serve` under load, beside the same model in a loop, behind LitServe, and behind a plain FastAPI endpoint.

Two sets of pictures: one size (800 x 1333, as the tables of the field have it), and the mixed sizes of photos.
"""

import asyncio
import gc
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dsg.bench.load import Load, Measured
from dsg.bench.report import Row
from dsg.bench.service_processes import Setup, batch_sizes, in_process, serving

ONE_SIZE = "800x1333"
MIXED = "mixed sizes"
_SIZE = (800, 1333)
# (height, width) of photos as COCO has them: about as often as there, each further times larger.
_MIXED = ((480, 640),) * 4 + ((640, 480),) * 2 + ((427, 640),) * 2 + ((640, 427), (612, 612), (375, 500), (1080, 1920))
_WARM_UP = (1, 2, 4, 8, 32)  # clients
_CLIENTS = (1, 8, 32)
_LOADS = (0.7, 1.0, 1.5)  # of what our server did with most clients
_LOAD_OF_MODEL = 0.7  # of what the model does without a server
_TIMES_ONE_CLIENT = 3  # of one client's latency: what p99 may be at 70 % load
# Twenty beyond the 99th of a hundred, so that one stall of a host is not all there is; at most so many times as long.
_TAIL_REQUESTS, _TAIL_TIMES = 2000, 5
_PICTURES = 24
_PATIENCE_S = 60.0  # of clients in closed loop, where throughput counts and no deadline
_READY_CPU_S, _READY_GPU_S = 10.0, 30.0  # from start to ready, with a warm cache
_TIMES_LATENCY = 10  # the deadline where none is given: so many times what one picture takes


@dataclass(frozen=True)
class OpenRun:
    """One server at one rate."""

    server: str
    rate: float
    measured: Measured


@dataclass
class Figures:
    """What the plot shows, and the rows say."""

    deadline_s: float = 0.0
    """Of the mixed sizes."""
    rows: list[Row] = field(default_factory=list)
    open_runs: list[OpenRun] = field(default_factory=list)
    batches: dict[str, float] = field(default_factory=dict)


def run(
    setup: Setup,
    deadline_s: float | None,
    seconds: float,
    peers: Sequence[str],
    images: Path | None,
    on_case: Callable[[str], None] = lambda case: None,
) -> Figures:
    """Measure everything, in turn.

    Args:
        setup: model, device, largest batch.
        deadline_s: what an answer must keep in open loop; None is ten times what one picture takes.
        seconds: of each measurement.
        peers: of `litserve` and `plain`, what is measured beside ours.
        images: folder of photos to take pictures from; None makes some up.
        on_case: told each case before it is measured.

    Raises:
        RuntimeError: a server that does not start.
        ValueError: a folder without photos; a model that is not there or does not load.
    """
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder, _no_search_for_rings():
        for name in (ONE_SIZE, MIXED):
            pictures = make_pictures(name, images)
            place = Path(folder) / name
            place.mkdir()
            for number, data in enumerate(pictures):
                (place / f"{number:03}.jpg").write_bytes(data)
            on_case(f"{name}: the model without a server")
            rate, latency_s = in_process(setup, place, seconds)
            figures.deadline_s = deadline_s or _TIMES_LATENCY * latency_s
            asyncio.run(_measure(name, setup, seconds, peers, pictures, rate, latency_s, figures, on_case))
    return figures


@contextmanager
def _no_search_for_rings() -> Iterator[None]:
    """Keep Python from looking through all of torch, a tenth of a second that would count as latency."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _measure(
    name: str,
    setup: Setup,
    seconds: float,
    peers: Sequence[str],
    pictures: Sequence[bytes],
    bare_rate: float,
    bare_latency_s: float,
    figures: Figures,
    on_case: Callable[[str], None],
) -> None:
    rows, deadline_s = figures.rows, figures.deadline_s
    runs: dict[tuple[str, float], Measured] = {}
    tails: dict[float, Measured] = {}
    rates: list[float] = []
    best = one_client_s = 0.0
    for server in ("dsg", *peers):
        with serving(server, setup, deadline_s) as running:
            port = running.port
            if name == ONE_SIZE:
                bar_s = _READY_GPU_S if setup.device.startswith("cuda") else _READY_CPU_S
                case = f"{server}, from start to ready; baseline what dsg may take"
                rows.append(_time_row(case, running.ready_s, bar_s))
            async with (
                Load(port, "/segment", pictures, _PATIENCE_S) as patient,
                Load(port, "/segment", pictures, deadline_s) as load,
            ):
                for clients in _WARM_UP:
                    await patient.closed(clients, min(seconds, 3.0))  # first runs of a batch size count for none
                for clients in _CLIENTS:
                    on_case(f"{name}: {server}, {clients} clients in closed loop")
                    done = await patient.closed(clients, seconds)
                    rows += _closed_rows(f"{name}: {server}", clients, done, bare_rate, bare_latency_s)
                    if clients == 1:
                        one_client_s = one_client_s or done.percentile(0.5)  # of ours, the first
                    best = max(best, done.rate()) if server == "dsg" else best
                parts = (_LOAD_OF_MODEL * bare_rate, *(share * best for share in _LOADS))
                rates = rates or [max(1 / seconds, rate) for rate in parts]
                for rate in rates[:2] if server == "dsg" else ():
                    on_case(f"{name}: {server}, {rate:.1f} requests a second for its p99")
                    tails[rate] = await load.open(rate, max(seconds, min(_TAIL_REQUESTS / rate, _TAIL_TIMES * seconds)))
                for rate in sorted(rates):
                    on_case(f"{name}: {server}, {rate:.1f} requests a second in open loop")
                    runs[server, rate] = await load.open(rate, seconds)
            if server == "dsg" and name == MIXED:
                figures.batches = batch_sizes(port)
    for (server, rate), measured in runs.items():
        rows += _open_rows(f"{name}: {server}, {rate:.1f} requests/s", measured, bare_latency_s, deadline_s)
        other = runs.get(("litserve", rate))
        if server == "dsg" and other is not None:
            case = f"{name}: dsg, {rate:.1f} requests/s, goodput within {deadline_s:.3g} s; baseline LitServe"
            rows.append(_rate_row(case, measured.rate(deadline_s), other.rate(deadline_s)))
        if name == MIXED:
            figures.open_runs.append(OpenRun(server, rate, measured))
    for rate, measured in tails.items():
        shares = f"{_of(rate, best)} of its best, {_of(rate, bare_rate)} of the model without a server"
        case = f"{name}: dsg, {rate:.1f} requests/s, {shares}, {len(measured.answers)} requests"
        p99_s, late_s = measured.percentile(0.99), max((one.late_s for one in measured.answers), default=0.0)
        bar = f"p99 latency; baseline {_TIMES_ONE_CLIENT} times the median of one client"
        rows.append(_time_row(f"{case}, {bar}", p99_s, _TIMES_ONE_CLIENT * one_client_s))
        rows.append(_time_row(f"{case}, latest that one was sent; baseline that p99", late_s, p99_s))
    if name == MIXED:
        total = sum(figures.batches.values())
        for size, count in figures.batches.items():
            case = f"{name}: dsg, batches of {size}; baseline all batches"
            rows.append(_row(case, count, "batches", total, count / total if total else 0.0))


def _closed_rows(case: str, clients: int, measured: Measured, bare_rate: float, bare_latency_s: float) -> list[Row]:
    what = "baseline the model without a server"
    rows = [_rate_row(f"{case}, throughput with {clients} clients; {what}", measured.rate(), bare_rate)]
    if clients == 1:
        median_s = measured.percentile(0.5)
        rows.append(_time_row(f"{case}, median latency of one client; {what}", median_s, bare_latency_s))
        steady = round(measured.rate() * median_s, 4)
        rows.append(_row(f"{case}, one client, throughput times median; less if stalled", steady, "share", 1.0, steady))
    return rows


def _open_rows(case: str, measured: Measured, bare_latency_s: float, deadline_s: float) -> list[Row]:
    rows = [
        _time_row(
            f"{case}, p{round(100 * share)} latency; baseline one picture without a server",
            measured.percentile(share),
            bare_latency_s,
        )
        for share in (0.5, 0.9, 0.99)
    ]
    offered = len(measured.answers) / measured.seconds
    within = measured.rate(deadline_s)
    rows.append(_rate_row(f"{case}, goodput within {deadline_s:.3g} s; baseline what was offered", within, offered))
    shed = measured.share(429, 503)
    rows.append(_row(f"{case}, share shed with 429 or 503; baseline all", round(shed, 4), "share", 1.0, round(shed, 4)))
    late = measured.share(0, 504)
    rows.append(_row(f"{case}, share too late; baseline all", round(late, 4), "share", 1.0, round(late, 4)))
    return rows


def _of(rate: float, whole: float) -> str:
    return f"{round(100 * rate / whole)} %" if whole else "nothing"


def _row(case: str, value: float, unit: str, baseline: float, ratio: float) -> Row:
    return Row(case, value, unit, baseline, round(ratio, 4))


def _rate_row(case: str, value: float, baseline: float) -> Row:
    return _row(case, round(value, 3), "pictures/s", round(baseline, 3), value / baseline if baseline else 0.0)


def _time_row(case: str, seconds: float, baseline_s: float) -> Row:
    ratio = baseline_s / seconds if seconds else 0.0
    return _row(case, round(seconds * 1000, 2), "ms", round(baseline_s * 1000, 2), ratio)


def make_pictures(name: str, images: Path | None) -> list[bytes]:
    """JPEG files of one size or of mixed ones, from photos of a folder, or made up.

    Raises:
        ValueError: no photo in the folder.
    """
    sizes = [_SIZE] * _PICTURES if name == ONE_SIZE else [_MIXED[n % len(_MIXED)] for n in range(_PICTURES)]
    photos: list[Path | None] = [None]
    if images is not None:
        photos = [path for path in sorted(images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        if not photos:
            raise ValueError(f"{images} has no .jpg or .png to send")
    return [_picture(photos[number % len(photos)], number, size) for number, size in enumerate(sizes)]


def _picture(photo: Path | None, number: int, size: tuple[int, int]) -> bytes:
    height, width = size
    if photo is None:
        chance = np.random.default_rng(number)
        # Blobs of a few sizes: pictures that compress, and whose boxes score differently, as photos do.
        small = chance.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    else:
        image = Image.open(photo).convert("RGB").resize((width, height))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
