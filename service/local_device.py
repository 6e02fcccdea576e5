"""A device of this process: batches that predictors run, their errors by what they mean, and a GPU's memory."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dsg.model.network.detections import on_cpu, with_counts
from dsg.service.devices import Device, DeviceLost, LoadPredictor, OutOfMemory, Ran, WorkerDied

if TYPE_CHECKING:
    from dsg.model.network.predictor import Predictor, PreparedImage

_MEMORY_S = 1.0  # how often a GPU is asked for its memory, which takes half a millisecond


class LocalDevice:
    """A device of this process.

    Args:
        name: torch's, or None for the best one there is.
        load: makes predictors.
    """

    ahead = 1

    def __init__(self, name: str | None, load: LoadPredictor) -> None:
        self.name = name or "default"
        self.when_died: Callable[[WorkerDied], None] = lambda error: None  # it dies with this process alone
        self._asked = name
        self._load = load
        self._predictors: dict[int, Predictor] = {}
        self._asked_for_memory = -math.inf

    def start(self) -> None:
        pass

    def load(self, model: int, source: str) -> "Predictor | None":
        self._predictors[model] = self._load(source, self._asked)
        return self._predictors[model]

    def begin(
        self,
        model: int,
        pictures: "Sequence[PreparedImage]",
        score_threshold: float,
        when_done: Callable[[], None] = lambda: None,
    ) -> Callable[[], Ran]:
        return lambda: self.launch(model, pictures, score_threshold).end(with_memory=self.is_memory_due())

    def launch(self, model: int, pictures: "Sequence[PreparedImage]", score_threshold: float) -> "Running":
        """Begin a batch at once; a second one may begin before it has ended."""
        return Running(self._predictors[model], pictures, score_threshold)

    def is_memory_due(self) -> bool:
        """Whether it is time to ask for a GPU's memory again."""
        now = time.monotonic()
        if now < self._asked_for_memory + _MEMORY_S:
            return False
        self._asked_for_memory = now
        return True

    def share(self, picture: "PreparedImage") -> "PreparedImage":
        return picture

    def forget(self, model: int) -> None:
        self._predictors.pop(model, None)

    def restart(self) -> None:
        raise RuntimeError("this process cannot restart a part of itself")

    def close(self) -> None:
        self._predictors.clear()


def are_processes(devices: Sequence[Device]) -> bool:
    """Whether the devices are processes of their own, and this one only prepares pictures and writes answers."""
    return not any(isinstance(device, LocalDevice) for device in devices)


class Running:
    """A batch that a predictor has begun; raises as `Device.begin` says, and so does `end`."""

    def __init__(self, predictor: "Predictor", pictures: "Sequence[PreparedImage]", score_threshold: float) -> None:
        self._predictor = predictor
        self._count = len(pictures)
        self.began = time.monotonic()
        with _errors_named(predictor):
            self._begun = predictor.begin(pictures, score_threshold)
        self._launched = time.monotonic()

    def is_done(self) -> bool:
        """Whether `end` would wait for nothing, or does all the work itself."""
        try:
            return self._begun.done is None or self._begun.done.query()
        except Exception:  # a GPU that fails says so to whoever asks; `end` tells what it means
            return True

    def end(self, since: float = 0.0, with_memory: bool = True) -> Ran:
        """Wait for its end.

        Args:
            since: on the clock of `time.monotonic`, when what the device ran before was ended.
        """
        predictor = self._predictor
        with _errors_named(predictor), _before_batches(predictor):
            if self._begun.done is not None:
                self._begun.done.synchronize()
            freed = time.monotonic()
            found = self._begun.finish()
            if self._begun.done is None:
                freed = time.monotonic()
            if len(found) != self._count:
                raise RuntimeError(f"detect gave {len(found)} answers for {self._count} pictures")
            if _is_cuda(predictor):
                # There it takes a fraction of what it would take threads here, and the probabilities need not travel.
                found = [replace(one, mask_probs=one.mask_probs[:, :0, :0]) for one in with_counts(found)]
            found = on_cpu(found)  # so that threads that write answers never wait for the device's next batch
            seconds = time.monotonic() - max(since, self.began)
            memory = memory_of(predictor) if with_memory else {}
            return Ran(found, seconds, memory, self._launched, freed)


@contextmanager
def _errors_named(predictor: "Predictor") -> Iterator[None]:
    """Raise an error of a network as what it means for the device."""
    try:
        yield
        return
    except Exception as error:
        failure = _named(error, predictor)
        # The traceback holds the batch's tensors, and whatever runs next needs their memory; its text is for the log.
        failure.add_note("".join(traceback.format_tb(error.__traceback__)))
        error.__traceback__ = None
    if isinstance(failure, OutOfMemory) and _is_cuda(predictor):
        import torch

        torch.cuda.empty_cache()
    raise failure


@contextmanager
def _before_batches(predictor: "Predictor") -> Iterator[None]:
    """Have a GPU do a few small things before the batch that runs: each would wait behind one of its kernels."""
    if not _is_cuda(predictor):
        yield
        return
    import torch

    with torch.cuda.stream(_urgent_stream(str(predictor.device))):
        yield


@cache
def _urgent_stream(device: str) -> Any:
    import torch

    return torch.cuda.Stream(device, priority=-1)


def memory_of(predictor: "Predictor") -> dict[str, int]:
    """Bytes of the memory of a predictor's GPU by kind; empty where it has none."""
    if not _is_cuda(predictor):
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(predictor.device)
    return {
        "allocated": torch.cuda.memory_allocated(predictor.device),
        "reserved": torch.cuda.memory_reserved(predictor.device),
        "free": free,
        "total": total,
    }


def _named(error: Exception, predictor: "Predictor") -> Exception:
    """An error of a network by what it means for the device."""
    text = str(error)
    lower = text.lower()
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in lower
        or "failed to allocate memory" in lower
        or "_status_alloc_failed" in lower  # cuBLAS, cuDNN
    ):
        return OutOfMemory(text)
    if (type(error).__name__ == "AcceleratorError" or "cuda error" in lower) and not _answers(predictor):
        return DeviceLost(text)
    return error


def _answers(predictor: "Predictor") -> bool:
    """Whether a device still does the smallest thing after it gave an error: most of CUDA's stay for good."""
    if not _is_cuda(predictor):
        return False
    import torch

    try:
        return torch.ones(1, device=predictor.device).add_(1).item() == 2
    except Exception:
        return False


def _is_cuda(predictor: "Predictor") -> bool:
    """Whether torch can say how a predictor's GPU is; an exported file may run on one where no torch is."""
    return str(getattr(predictor, "device", "cpu")).startswith("cuda") and find_spec("torch") is not None
