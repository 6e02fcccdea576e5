"""What one application owns: models, queue, threads; and how it starts and stops."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from dsg.service.admission import Admission
from dsg.service.batching import Batcher
from dsg.service.metrics import Metrics
from dsg.service.models import LoadPredictor, Models, warm_up_picture
from dsg.service.problems import Problem, stopping
from dsg.service.settings import Settings

_log = structlog.get_logger("dsg.service")
_Result = TypeVar("_Result")
_WARM_UP_S = 600.0  # a first run may compile or pick kernels
_CLOSE_S = 2.0  # what is left on the device at the end: at most the batch of requests that were given up


class Service:
    """One per application; made before the event loop runs, started and stopped in it."""

    def __init__(self, settings: Settings, load_predictor: LoadPredictor) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.models = Models(load_predictor, settings.device, settings.model_dir, self.metrics)
        self.batcher = Batcher(settings.max_batch, self.metrics)
        self.admission = Admission(settings.max_queue, self.batcher.seconds_per_picture, self.metrics)
        self.active = 0
        """Requests whose answer is not complete yet."""
        self._warm = False
        self._draining = False
        self._reloading = asyncio.Lock()
        self._decoders = ThreadPoolExecutor(settings.decode_workers, "dsg-decode")
        # Apart from the decoders: a finished picture must not wait behind those that have just come.
        self._encoders = ThreadPoolExecutor(settings.encode_workers, "dsg-encode")
        self._loader = ThreadPoolExecutor(1, "dsg-load")

    async def start(self) -> None:
        """Load and warm every model. Raises ValueError or OSError with one line when that fails."""
        self.models.check_names(self.settings.models)
        self.batcher.start()
        for asked in self.settings.models:
            await self._load(asked)
        self._warm = True

    async def stop(self) -> None:
        """Fail what still waits, end the threads."""
        self.drain()
        for pool in (self._decoders, self._encoders, self._loader):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.batcher.close, _CLOSE_S)

    def drain(self) -> None:
        """Take no new work from now on; what is in flight goes on."""
        self._draining = True

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining

    def check_ready(self) -> None:
        """Raise the 503 problem that says why no picture can be taken now, if none can."""
        if self._draining:
            raise stopping()
        if not self._warm:
            raise Problem(503, "loading", "the model is still loading; try again soon", {"Retry-After": "5"})
        self.check_healthy()

    def check_healthy(self) -> None:
        """Raise the 503 problem if this process must be restarted."""
        if self.batcher.fault is not None:
            raise Problem(503, "unhealthy", self.batcher.fault, {"Connection": "close"})

    async def reload(self, name: str) -> str:
        """Load a model from the model folder, warm it, and swap it in; requests go on meanwhile.

        Returns:
            the name that it is served under: without the ending that `name` may have.

        Raises:
            Problem: 422 no such model, or a file that does not load (the old model stays).
        """
        source = self.models.reload_source(name)
        async with self._reloading:
            try:
                return await self._load(source)
            except (ValueError, TypeError, OSError) as error:
                _log.warning("reload failed", model=name, error=str(error))
                detail = f"model {name!r} does not load, and the log says why; what was served before still is"
                raise Problem(422, "broken_model", detail) from None

    async def decoding(self, task: Callable[[], _Result]) -> _Result:
        """Run a task on a decode thread; cancelling drops it if it has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, task)

    async def encoding(self, task: Callable[[], _Result]) -> _Result:
        """Run a task on an encode thread; cancelling drops it if it has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, task)

    async def _load(self, asked: str) -> str:
        loop = asyncio.get_running_loop()
        name, predictor = await loop.run_in_executor(self._loader, self.models.load, asked)
        picture = await loop.run_in_executor(self._loader, predictor.prepare, warm_up_picture())
        # Through the queue: only the device thread may call a predictor, also while others are being served.
        (first,) = self.batcher.submit(predictor, [picture], time.monotonic() + _WARM_UP_S)
        await asyncio.wrap_future(first)
        self.models.serve(name, predictor)
        info = predictor.info
        _log.info("model ready", model=name, version=info.version, hash=info.hash[:12], licence=info.licence)
        return name
