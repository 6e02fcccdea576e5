"""How long a function takes, next to what it is compared with."""

import statistics
import time
from collections.abc import Callable

import torch

_WARM_UP = 3


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], device: torch.device, repeats: int
) -> tuple[float, float]:
    """Median times of two functions in milliseconds, measured in turn, so that both meet the same machine.

    Args:
        ours, theirs: no arguments; what they return is dropped.
        device: on CUDA the time until the GPU is done counts.
        repeats: measurements of each, after 3 that do not count.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(_WARM_UP + repeats):
        for run, kept in zip((ours, theirs), times, strict=True):
            milliseconds = _once(run, device)
            if repeat >= _WARM_UP:
                kept.append(milliseconds)
    return statistics.median(times[0]), statistics.median(times[1])


def milliseconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Times of one function in milliseconds, after 3 runs that do not count."""
    return [_once(run, device) for _ in range(_WARM_UP + repeats)][_WARM_UP:]


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1000
