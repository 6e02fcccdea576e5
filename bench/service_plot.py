"""The plot of `dsg bench service`: latency and goodput against the rate that is asked, and the batches."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from dsg.bench.service import MIXED, Figures


def draw(path: Path, figures: Figures, title: str) -> None:
    """Write a PNG. Raises OSError where it cannot be written."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    latency, goodput, batches = figure.subplots(1, 3)
    for server in dict.fromkeys(one.server for one in figures.open_runs):
        runs = [one for one in figures.open_runs if one.server == server]
        rates = [one.rate for one in runs]
        # A rate at which nothing was answered has no latency.
        latencies = [one.measured.percentile(0.99) * 1000 or math.nan for one in runs]
        latency.plot(rates, latencies, marker="o", label=server)
        goodput.plot(rates, [one.measured.rate(figures.deadline_s) for one in runs], marker="o", label=server)
    latency.set(xlabel="requests/s asked", ylabel="p99 latency of successes, ms", ylim=(0, None))
    goodput.set(xlabel="requests/s asked", ylabel=f"answers/s within {figures.deadline_s:.3g} s", ylim=(0, None))
    latency.legend()
    batches.bar(list(figures.batches), list(figures.batches.values()))
    batches.set(xlabel="pictures in a batch of dsg", ylabel="batches")
    batches.tick_params(axis="x", rotation=60)
    figure.suptitle(f"{title}; {MIXED}, open loop")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
