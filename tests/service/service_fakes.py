"""A predictor that finds coloured rectangles, and a real server around it.

It follows the interface of `dsg.model.network.predictor.Predictor`, but what it answers can be read off a picture:
each rectangle of pure red, green or blue is one instance. So each answer can be checked against its own picture.
"""

import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize
from dsg.model.network.detections import Detections
from dsg.model.network.predictor import Begun, PreparedImage
from dsg.service.app import create_app
from dsg.service.settings import Settings

RED, GREEN, BLUE, POISON = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)
# First rows of pictures that `load_faulty`'s predictor does something bad with.
LETHAL, GREEDY, HUGE, STICKY, HELD = (255, 128, 0), (0, 128, 255), (0, 60, 200), (128, 255, 0), (60, 200, 60)
COLOURS = (RED, GREEN, BLUE)
SCORES = (0.9, 0.7, 0.3)
CATEGORY_IDS = (7, 90, 3)  # with gaps and out of order, as in files from the wild
RELOAD_KEY = "a key of the tests, long enough"
_PATIENCE_S = 60  # a wait that takes this long is a failed test


def info(name: str = "fake", digest: str = "0123abcd") -> CheckpointInfo:
    names = ("red", "green", "blue")
    return CheckpointInfo(
        name=name,
        preset="dsg_lite0_fpn",
        overrides={},
        categories=tuple(Category(i, n, "colour") for i, n in zip(CATEGORY_IDS, names, strict=True)),
        resize=Resize(800, 1333),
        score_threshold=0.5,
        max_detections=20,
        licence="Apache-2.0",
        version="0.1.0",
        hash=digest,
    )


class FakePredictor:
    """Blocks in `detect` while `gate` is closed; `entered` counts the batches that came in."""

    def __init__(self, name: str = "fake", digest: str = "0123abcd") -> None:
        self.info = info(name, digest)
        self.device = torch.device("cpu")
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[tuple[int, int]]] = []
        self.thresholds: list[float] = []
        self.threads: set[str] = set()
        self.failure: Callable[[Sequence[PreparedImage]], Exception | None] = poisoned

    def prepare(self, image: np.ndarray) -> PreparedImage:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        height, width = image.shape[:2]
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        return PreparedImage(torch.from_numpy(image).permute(2, 0, 1), (height, width), padded)

    def begin(self, prepared: Sequence[PreparedImage], score_threshold: float = 0.0) -> Begun:
        return Begun(lambda: self.detect(prepared, score_threshold))

    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float = 0.0) -> list[Detections]:
        self.threads.add(threading.current_thread().name)
        assert len({one.padded_size for one in prepared}) == 1
        self.batches.append([one.original_size for one in prepared])
        self.thresholds.append(score_threshold)
        self.entered.release()
        assert self.gate.wait(_PATIENCE_S)
        error = self.failure(prepared)
        if error is not None:
            raise error
        return [find_rectangles(one.pixels.permute(1, 2, 0).numpy()) for one in prepared]

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=_PATIENCE_S)


def poisoned(prepared: Sequence[PreparedImage]) -> Exception | None:
    bad = torch.tensor(POISON, dtype=torch.uint8)
    hit = any((one.pixels[:, 0, 0] == bad).all() for one in prepared)
    return RuntimeError("a picture that this network cannot stand") if hit else None


class FaultyPredictor(FakePredictor):
    """Breaks as a picture's first row says; where a process of its own runs it, that one breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.failure = self._break

    def _break(self, prepared: Sequence[PreparedImage]) -> Exception | None:
        rows = {tuple(one.pixels[:, 0, 0].tolist()) for one in prepared}
        if LETHAL in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        if HELD in rows:
            # Opening a named pipe waits for its other end: the test says when this goes on.
            Path(os.environ["TEST_HELD"]).open().close()
        if HUGE in rows or (GREEDY in rows and len(prepared) > 1):
            return RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if STICKY in rows:
            return RuntimeError("CUDA error: an illegal memory access was encountered")
        return poisoned(prepared)


def load_faulty(name: str, device: str | None) -> FaultyPredictor:
    """What `dsg.service` calls to load a model; importable, so that a worker process can too."""
    predictor = FaultyPredictor()
    path = Path(name)
    if path.is_file() and path.stat().st_size:  # a file of the tests' model folder: its text is the model's hash
        predictor.info = info(path.stem, path.read_text())
        if predictor.info.hash == "broken":
            raise ValueError(f"{name} is no checkpoint")
    return predictor


class CudaPredictor(FakePredictor):
    """Has a GPU, and breaks it for good over a picture that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda")

    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float = 0.0) -> list[Detections]:
        sums = [one.pixels.to(self.device).sum() for one in prepared]
        if any(tuple(one.pixels[:, 0, 0].tolist()) == STICKY for one in prepared):
            beyond = torch.tensor([10**6], device=self.device)
            sums.append(torch.zeros(1, device=self.device)[beyond].sum())  # an assertion fails on the GPU
        torch.stack(sums).tolist()
        return super().detect(prepared, score_threshold)


def load_cuda(name: str, device: str | None) -> CudaPredictor:
    """What `dsg.service` calls to load a model; importable, so that a worker process can too."""
    return CudaPredictor()


def faulty_picture(colour: tuple[int, int, int], size: tuple[int, int] = (96, 64)) -> bytes:
    """A picture with one red rectangle, and a first row that `FaultyPredictor` understands."""
    image = picture((20, 10, 60, 40), size=size)
    image.paste(colour, (0, 0, size[0], 1))
    return encoded(image)


def find_rectangles(pixels: np.ndarray) -> Detections:
    """Each row of pixels of one colour that starts a rectangle is one instance; JPEG's rounding is tolerated."""
    boxes, labels = [], []
    for label, colour in enumerate(COLOURS, 1):
        hit = np.abs(pixels.astype(int) - colour).max(axis=2) < 90
        while hit.any():
            y, x = (int(v) for v in np.argwhere(hit)[0])
            x2 = x + int(np.argmin(np.append(hit[y, x:], False)))
            y2 = y + int(np.argmin(np.append(hit[y:, x], False)))
            hit[y:y2, x:x2] = False
            boxes.append((x, y, x2, y2))
            labels.append(label)
    n = len(boxes)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
        torch.tensor([SCORES[label - 1] for label in labels], dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        torch.ones(n, 28, 28),
        pixels.shape[:2],
    )


def picture(
    *rectangles: tuple[int, int, int, int],
    size: tuple[int, int] = (96, 64),
    colour: tuple[int, int, int] = RED,
) -> Image.Image:
    """A grey picture of (width, height) with rectangles (x1, y1, x2, y2) of one colour."""
    image = Image.new("RGB", size, (128, 128, 128))
    for box in rectangles:
        image.paste(colour, box)
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Server:
    """A real server on a socket of this machine, in a thread."""

    def __init__(self, app: Any, predictor: FakePredictor, base_url: str) -> None:
        self.app = app
        self.service = app.state.service
        self.predictor = predictor
        self.base_url = base_url
        self.client = httpx.Client(base_url=base_url, timeout=_PATIENCE_S)

    def post(self, data: bytes, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "image/png", **options.pop("headers", {})}
        return self.client.post("/segment", content=data, headers=headers, **options)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    def await_metric(self, name: str, value: float, **labels: str) -> None:
        """Ask the server until a metric has a value; the round trips are what passes the time."""
        with httpx.Client(base_url=self.base_url, timeout=_PATIENCE_S) as client:
            while self.metric(name, **labels) != value:
                assert client.get("/healthz").status_code in (200, 503)


class _ThreadServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.listening.set()


@contextlib.contextmanager
def serving(load: Callable[[str, str | None], FakePredictor] | None = None, **settings: Any) -> Iterator[Server]:
    """Run a server as long as the block does."""
    predictor = FakePredictor()
    values = {"model": "fake", "decode_workers": 2, "device": "cpu", **settings}
    if values.get("devices"):
        del values["device"]
    app = create_app(Settings(**values), load or (lambda name, device: predictor))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none", lifespan="on")
    server = _ThreadServer(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert server.listening.wait(_PATIENCE_S)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Server(app, predictor, f"http://127.0.0.1:{port}")
    try:
        yield running
    finally:
        predictor.gate.set()
        running.client.close()
        server.should_exit = True
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()
