"""How long a function takes, how much that spreads and what memory it needs, next to what it is compared with."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_WARM_UP = 3
_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache
_FLUSHES = 8  # 0.7 ms on an H100: longer than Python takes to launch what is timed next

Run = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """Repeated measurements of one function."""

    times: Sequence[float]
    """Milliseconds, in the order they were taken; at least one."""
    peak_mib: float | None = None
    """Most memory that its tensors took on the GPU beyond what was taken before, MiB; None on a CPU."""

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile, milliseconds, linear between two measurements."""
        low, high = np.percentile(self.times, (10, 90))
        return float(low), float(high)


class PeakMemory:
    """Most memory that tensors take on a GPU from here on, beyond what they take now. One at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def mib(self) -> float | None:
        """MiB so far; None on a CPU."""
        if self._device.type != "cuda":
            return None
        return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20


def compare(ours: Run, theirs: Run, device: torch.device, repeats: int) -> tuple[Measured, Measured]:
    """Wall-clock times of two functions, measured in turn, so that both meet the same machine.

    Args:
        ours, theirs: no arguments; what they return is dropped.
        device: on CUDA the time until the GPU is done counts.
        repeats: measurements of each, after 3 that do not count.
    """
    peaks = _warm_up(ours, device), _warm_up(theirs, device)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, kept in zip((ours, theirs), times, strict=True):
            kept.append(_once(run, device))
    return Measured(times[0], peaks[0]), Measured(times[1], peaks[1])


def compare_kernels(ours: Run, theirs: Run, device: torch.device, repeats: int) -> tuple[Measured, Measured]:
    """Times of two functions on the GPU alone, by its own clock; on a CPU as `compare`.

    Nothing waits for the host between the repeats, which are queued ahead, in turn: what Python takes to launch a
    kernel does not count on either side, what a function itself waits for does. Before each the second-level cache is
    overwritten, since a network's features come from memory.

    Args: as in `compare`.
    """
    if device.type != "cuda":
        return compare(ours, theirs, device, repeats)
    peaks = _warm_up(ours, device), _warm_up(theirs, device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    marks: tuple[list[tuple[torch.cuda.Event, torch.cuda.Event]], ...] = ([], [])
    for _ in range(repeats):
        for run, kept in zip((ours, theirs), marks, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(_FLUSHES):
                flush.zero_()
            begin.record()
            run()
            end.record()
            kept.append((begin, end))
    torch.cuda.synchronize(device)
    times = [[begin.elapsed_time(end) for begin, end in kept] for kept in marks]
    return Measured(times[0], peaks[0]), Measured(times[1], peaks[1])


def measure(run: Run, device: torch.device, repeats: int) -> Measured:
    """Wall-clock times of one function after 3 runs that do not count; arguments as in `compare`."""
    peak = _warm_up(run, device)
    return Measured([_once(run, device) for _ in range(repeats)], peak)


def _warm_up(run: Run, device: torch.device) -> float | None:
    """Runs that do not count but for their memory: a graph that is replayed later takes none of its own."""
    memory = PeakMemory(device)
    for _ in range(_WARM_UP):
        _once(run, device)
    return memory.mib()


def _once(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1000
