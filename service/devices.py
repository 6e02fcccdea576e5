"""A device that runs batches, and what can go wrong on it.

`LocalDevice` (`dsg.service.local_device`) runs them in this process, which suits a CPU: its operations are long, and
Python's lock is free meanwhile. A GPU is fed by many short calls, which would wait for the lock behind every other
thread of a busy server; so it gets a process of its own (`dsg.service.worker_device`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dsg.model.network.detections import Detections
    from dsg.model.network.predictor import Predictor, PreparedImage

LoadPredictor = Callable[[str, str | None], "Predictor"]
"""(name or path, device or None for the best) -> Predictor; raises ValueError or OSError with one line."""


class OutOfMemory(Exception):
    """A batch did not fit into the device's memory; a smaller one may."""


class DeviceLost(Exception):
    """The device answers nothing any more, and will not until its process is restarted."""


class WorkerDied(Exception):
    """The process of a device ended by itself, or was killed since it hung."""


@dataclass(frozen=True)
class Ran:
    """A batch that ran."""

    detections: "list[Detections]"
    """One for each picture, on the CPU."""
    seconds: float
    """What the device took for it."""
    memory: dict[str, int]
    """Bytes of the device's memory by kind (`allocated`, `reserved`, `free`, `total`); empty for a CPU, and where it
    was not asked."""
    launched: float = 0.0
    """When the device had it, on the clock of `time.monotonic`, which is one for all processes of a machine."""
    freed: float = 0.0
    """When the device was done with it, on that clock."""


class Device(Protocol):
    """What runs batches. `begin`, `restart` and the callable that `begin` gives belong to one thread at a time, the
    other methods to any."""

    name: str
    ahead: int
    """How many batches it takes before the first of them is done."""
    when_died: Callable[[WorkerDied], None]
    """Set by whoever runs batches on it. Called in some thread when its process has died, before anything that was
    asked of that process raises `WorkerDied`, and also where nothing was."""

    def start(self) -> None:
        """Start what it needs; once, before all else."""

    def load(self, model: int, source: str) -> "Predictor | None":
        """Load a model under a number. A predictor that comes back may prepare pictures in this process.

        Raises:
            ValueError, OSError, RuntimeError: one line.
            WorkerDied: its process ended over it.
        """

    def begin(
        self,
        model: int,
        pictures: "Sequence[PreparedImage]",
        score_threshold: float,
        when_done: Callable[[], None] = lambda: None,
    ) -> Callable[[], Ran]:
        """Begin a batch.

        Args:
            when_done: called in some thread once the batch has run or failed, by a device that takes several.

        Returns:
            a callable that waits for its end, and raises `OutOfMemory`, `DeviceLost`, `WorkerDied` or whatever the
            network raised.
        """

    def share(self, picture: "PreparedImage") -> "PreparedImage":
        """The same picture, its pixels where the device can read them."""

    def forget(self, model: int) -> None:
        """Let go of a model that no batch will ask for."""

    def restart(self) -> None:
        """Make it whole again after `WorkerDied`, with its models. Raises what `load` raises."""

    def close(self) -> None:
        """End what it started."""
