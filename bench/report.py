"""The files of bench/results: every figure of a document comes from one."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from dsg.bench.timing import Measured


@dataclass(frozen=True)
class Row:
    """One figure and what it is compared with, both measured in one run."""

    case: str
    value: float
    unit: str
    baseline: float
    """The same figure of what it is compared with, which `case` names."""
    ratio: float
    """baseline / value for times and sizes, value / baseline for rates and scores: above 1 is better."""
    spread: tuple[float, float] | None = None
    """10th and 90th percentile of the measurements whose median is `value`, in its unit."""
    baseline_spread: tuple[float, float] | None = None
    peak_mib: float | None = None
    """Most GPU memory that the tensors of what was measured took beyond what was taken before, MiB."""
    baseline_peak_mib: float | None = None


def time_row(case: str, milliseconds: float, baseline: float) -> Row:
    """A row of a time in milliseconds."""
    return Row(case, round(milliseconds, 4), "ms", round(baseline, 4), round(baseline / milliseconds, 3))


def rate_row(case: str, unit: str, rate: float, baseline: float) -> Row:
    """A row of a rate, such as pictures a second."""
    return Row(case, round(rate, 2), unit, round(baseline, 2), round(rate / baseline, 3))


def size_row(case: str, unit: str, size: float, baseline: float) -> Row:
    """A row of a size, such as GiB."""
    return Row(case, round(size, 3), unit, round(baseline, 3), round(baseline / size, 3))


def measured_row(case: str, ours: Measured, theirs: Measured, *, images: int | None = None) -> Row:
    """A row with spread and memory.

    Args:
        images: pictures of one measurement, where images a second are wanted in place of milliseconds.
    """
    if images is None:
        row, scale = time_row(case, ours.median, theirs.median), _unchanged
    else:
        scale = partial(_per_second, images)
        row = rate_row(case, "images/s", scale(ours.median), scale(theirs.median))
    return replace(
        row,
        spread=_spread(ours, scale),
        baseline_spread=_spread(theirs, scale),
        peak_mib=None if ours.peak_mib is None else round(ours.peak_mib, 1),
        baseline_peak_mib=None if theirs.peak_mib is None else round(theirs.peak_mib, 1),
    )


def _unchanged(milliseconds: float) -> float:
    return milliseconds


def _per_second(images: int, milliseconds: float) -> float:
    return images * 1000 / milliseconds


def _spread(measured: Measured, scale: Callable[[float], float]) -> tuple[float, float]:
    low, high = sorted(scale(end) for end in measured.spread)
    return round(low, 4), round(high, 4)


def write(path: Path, rows: list[Row], device: torch.device, *, add: bool = False) -> None:
    """Write one file of results.

    Args:
        path: its stem becomes the name of the results.
        rows: in the order to show them; what a row does not know is left out of it.
        device: what was measured.
        add: rows that the file has already stay, but those of the same cases.

    Raises:
        ValueError: no commit is known; or rows are to be added to those of another device, commit or torch.
        OSError: the file cannot be written.
    """
    entries = [{name: value for name, value in asdict(row).items() if value is not None} for row in rows]
    document = {
        "name": path.stem,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "torch": torch.__version__,
        "rows": entries,
    }
    if add and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key in ("commit", "device", "torch"):
            if before[key] != document[key]:
                raise ValueError(
                    f"{path} was measured with {key} {before[key]}, not {document[key]}: write another file"
                )
        measured = {row.case for row in rows}
        document["rows"] = [row for row in before["rows"] if row["case"] not in measured] + entries
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def commit() -> str:
    """Hash of the checkout, with `-dirty` where files differ from it; DSG_COMMIT where there is no .git.

    Raises:
        ValueError: neither is there.
    """
    if given := os.environ.get("DSG_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError("results name their commit, and this is no git checkout: set DSG_COMMIT") from None
    return ran.stdout.strip()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
