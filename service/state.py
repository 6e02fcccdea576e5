"""What one application owns: models, devices, queue, threads; and how it starts and stops."""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import structlog

from dsg.service.admission import Admission
from dsg.service.batching import Batcher, DeviceLost, OutOfMemory, WorkerDied
from dsg.service.choose_devices import choose_devices
from dsg.service.devices import Device, LoadPredictor
from dsg.service.local_device import are_processes
from dsg.service.metrics import Metrics
from dsg.service.models import Models, ServedModel
from dsg.service.peers import Peers, merged
from dsg.service.problems import Problem, stopping
from dsg.service.relay import when_all
from dsg.service.settings import Settings
from dsg.service.tracing import Tracing
from dsg.service.warm_up import warm_up_batches

_log = structlog.get_logger("dsg.service")
_Given = TypeVar("_Given")
_Result = TypeVar("_Result")
_CLOSE_S = 0.5  # what is left on the devices at the end: at most the batches of requests that were given up
_LAG_PERIOD_S = 0.1


class Service:
    """One per application; made before the event loop runs, started and stopped in it.

    Raises:
        ValueError: settings that name devices or tracing that are not there.
    """

    def __init__(self, settings: Settings, load_predictor: LoadPredictor) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tracing = Tracing(settings.tracing)
        self._devices: list[Device] = choose_devices(settings, load_predictor)
        self._started: list[Device] = []
        self.models = Models(load_predictor, self._devices, settings.model_dir, self.metrics)
        self.batcher = Batcher(
            self._devices,
            max_batch=settings.max_batch,
            max_batch_pixels=settings.max_batch_pixels,
            ageing_s=settings.ageing_ms / 1000,
            metrics=self.metrics,
        )
        self.admission = Admission(
            pictures=settings.max_queue,
            pixels=settings.max_pixels_in_flight,
            max_bytes=settings.max_bytes_in_flight,
            seconds_until_free=self.batcher.seconds_until_free,
            seconds_of_queue=self.batcher.seconds_of_queue,
            metrics=self.metrics,
        )
        self.active = 0
        """Requests whose answer is not complete yet."""
        self.peers: Peers | None = None
        """Further servers behind the same address, where an engine runs several; set before the service starts."""
        self._warm = False
        self._draining = False
        self._reloading = asyncio.Lock()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "dsg-decode")
        # Apart from the decoders: a finished picture must not wait behind those that have just come.
        self._encoders = ThreadPoolExecutor(settings.encode_threads, "dsg-encode")
        self._loader = ThreadPoolExecutor(1, "dsg-load")
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load and warm every model. Raises ValueError, OSError or RuntimeError with one line when that fails."""
        self._watch = asyncio.create_task(self._watch_event_loop())
        self.models.check_names(self.settings.models)
        for device in self._devices:
            device.start()
            self._started.append(device)
        self.batcher.start()
        for asked in self.settings.models:
            try:
                await self._load(asked)
            except (OutOfMemory, DeviceLost, WorkerDied) as error:
                raise RuntimeError(str(error).splitlines()[0]) from error
        # Python looks for rings of objects while all threads wait: 0.2 to 0.4 s where it looks through torch as well.
        gc.collect()
        gc.freeze()
        self._warm = True

    async def stop(self) -> None:
        """Fail what still waits, end the threads and processes.

        A thread that is in the middle of a picture, a batch or a model goes on after that, for no one.
        """
        self.drain()
        if self._watch is not None:
            self._watch.cancel()
        for pool in (self._decoders, self._encoders, self._loader):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(self._close_devices(), asyncio.to_thread(self.tracing.close))

    def drain(self) -> None:
        """Take no new work from now on; what is in flight goes on."""
        self._draining = True

    @property
    def has_workers(self) -> bool:
        """Whether the devices are processes of their own, and this one only prepares and writes."""
        return are_processes(self._devices)

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining

    def check_ready(self) -> None:
        """Raise the 503 problem that says why no picture can be taken now, if none can."""
        if self._draining:
            raise stopping()
        self.check_healthy()
        if not self._warm:
            raise Problem(503, "loading", "the model is still loading; try again soon", {"Retry-After": "5"})
        if not self.batcher.is_up:
            raise Problem(503, "restarting", "the device is being restarted; try again soon", {"Retry-After": "5"})

    def check_healthy(self) -> None:
        """Raise the 503 problem if this process must be restarted."""
        if self.batcher.fault is not None:
            raise Problem(503, "unhealthy", self.batcher.fault, {"Connection": "close", "Retry-After": "10"})

    async def metrics_page(self) -> bytes:
        """What Prometheus scrapes: of all servers behind the address, where there are several."""
        return self.metrics.text() if self.peers is None else merged(await self.peers.metrics())

    async def reload(self, name: str) -> ServedModel:
        """Load a model anew, here and wherever else this service runs; requests go on meanwhile.

        Raises:
            Problem: 422 no such model, or a file that does not load (the old model stays); 503 a device, or another
                server, has not loaded it.
        """
        model = await self.reload_here(name)
        failed = [] if self.peers is None else await self.peers.reload(name)
        if failed:
            _log.warning("reload failed elsewhere", model=name, replicas=failed)
            detail = f"{len(failed)} other replicas did not load {name!r}, and their logs say why; ask again"
            raise Problem(503, "partly_reloaded", detail, {"Retry-After": "5"})
        return model

    async def reload_here(self, name: str) -> ServedModel:
        """Load a model from the model folder, warm it, and swap it in, in this process; raises as `reload` does."""
        source = self.models.reload_source(name)
        async with self._reloading:
            try:
                model = await self._load(source)
            except (ValueError, TypeError, OSError, RuntimeError, OutOfMemory, DeviceLost, WorkerDied) as error:
                self.metrics.reloads.labels("failed").inc()
                _log.warning("reload failed", model=name, error=str(error))
                if isinstance(error, OutOfMemory | DeviceLost | WorkerDied):
                    detail = "a device had no room for it, or stopped meanwhile, and the log says more; ask again"
                    raise Problem(503, "not_reloaded", detail, {"Retry-After": "5"}) from None
                detail = f"model {name!r} does not load, and the log says why; what was served before still is"
                raise Problem(422, "broken_model", detail) from None
        self.metrics.reloads.labels("swapped").inc()
        return model

    async def decoding(self, task: Callable[[], _Result]) -> _Result:
        """Run a task on a decode thread; cancelling drops it if it has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, task)

    async def encoding_of(self, futures: Sequence[Future[_Given]], task: Callable[[list[_Given]], _Result]) -> _Result:
        """Run a task on an encode thread as soon as all futures have their results; raises what one of them raises."""
        return await asyncio.wrap_future(when_all(futures, self._encoders, task))

    async def _load(self, asked: str) -> ServedModel:
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(self._loader, self.models.load, asked)
        on_gpu = any(device.name.startswith("cuda") for device in self._devices)
        batches = await loop.run_in_executor(
            self._loader, warm_up_batches, model, self.settings.max_batch, self.settings.max_batch_pixels, on_gpu
        )
        # Through the queue: only a device's own thread may run it, also while others are being served.
        await asyncio.gather(*map(asyncio.wrap_future, self.batcher.warm(model, batches)))
        self.models.serve(model)
        info = model.info
        _log.info("model ready", model=model.name, version=info.version, hash=info.hash[:12], licence=info.licence)
        return model

    async def _close_devices(self) -> None:
        await asyncio.to_thread(self.batcher.close, _CLOSE_S)
        await asyncio.gather(*(asyncio.to_thread(device.close) for device in self._started))
        self.models.close()

    async def _watch_event_loop(self) -> None:
        """Measure how late the loop wakes: whatever blocks it shows here."""
        while True:
            asked = time.monotonic()
            await asyncio.sleep(_LAG_PERIOD_S)
            self.metrics.event_loop_lag.observe(max(0.0, time.monotonic() - asked - _LAG_PERIOD_S))
