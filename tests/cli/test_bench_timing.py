"""What the benchmarks make of repeated measurements, and what of it goes into a file."""

import json
from pathlib import Path

import pytest
import torch

from dsg.bench import report
from dsg.bench.report import measured_row, size_row, time_row
from dsg.bench.timing import Measured, PeakMemory, compare, compare_kernels, measure

CPU = torch.device("cpu")


def test_median_and_spread() -> None:
    measured = Measured([float(number) for number in range(11, 0, -1)])
    assert (measured.median, measured.spread) == (6.0, (2.0, 10.0))
    assert Measured([3.0]).spread == (3.0, 3.0)


def test_row_of_times_and_of_rates() -> None:
    ours, theirs = Measured([10.0, 20.0, 40.0], peak_mib=100.04), Measured([100.0, 50.0, 50.0], peak_mib=7.0)
    row = measured_row("a; baseline b", ours, theirs)
    assert (row.value, row.unit, row.baseline, row.ratio) == (20.0, "ms", 50.0, 2.5)
    # a tenth of the way through three values is a fifth of the way from the first to the second
    assert row.spread == (12.0, 36.0) and row.baseline_spread == (50.0, 90.0)
    assert (row.peak_mib, row.baseline_peak_mib) == (100.0, 7.0)

    row = measured_row("a; baseline b", ours, theirs, images=2)
    assert (row.value, row.unit, row.baseline, row.ratio) == (100.0, "images/s", 40.0, 2.5)
    assert row.spread == (55.5556, 166.6667) and row.baseline_spread == (22.2222, 40.0)

    row = size_row("c", "GiB", 5.0, 10.0)
    assert (row.value, row.unit, row.baseline, row.ratio) == (5.0, "GiB", 10.0, 2.0)


def test_rows_join_those_of_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSG_COMMIT", "abc123")
    out = tmp_path / "rows.json"
    report.write(out, [time_row("old", 2.0, 5.0)], CPU)
    old = json.loads(out.read_text())["rows"]
    assert set(old[0]) == {"case", "value", "unit", "baseline", "ratio"}
    report.write(out, [measured_row("new", Measured([1.0, 3.0]), Measured([2.0]))], CPU, add=True)
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == old[0]
    assert rows[1] == {
        "case": "new",
        "value": 2.0,
        "unit": "ms",
        "baseline": 2.0,
        "ratio": 1.0,
        "spread": [1.2, 2.8],
        "baseline_spread": [2.0, 2.0],
    }


@pytest.mark.parametrize("way", [compare, compare_kernels])
def test_both_sides_are_measured_in_turn(way: type) -> None:
    ran: list[str] = []
    ours, theirs = way(lambda: ran.append("o"), lambda: ran.append("t"), CPU, 3)
    assert "".join(ran) == "ooo" + "ttt" + "ototot"
    assert len(ours.times) == len(theirs.times) == 3 and min(*ours.times, *theirs.times) >= 0
    assert ours.peak_mib is None and PeakMemory(CPU).mib() is None


@pytest.mark.gpu
@pytest.mark.parametrize("way", [compare, compare_kernels])
def test_memory_of_both_sides(way: type) -> None:
    device = torch.device("cuda")
    kept = torch.empty(8 << 20, dtype=torch.uint8, device=device)

    def take(mib: int) -> None:
        torch.empty(mib << 20, dtype=torch.uint8, device=device).fill_(1)

    ours, theirs = way(lambda: take(64), lambda: take(16), device, 2)
    assert (ours.peak_mib, theirs.peak_mib) == (64.0, 16.0)
    assert all(time > 0 for time in (*ours.times, *theirs.times))
    assert measure(lambda: take(32), device, 1).peak_mib == 32.0
    assert len(kept) == 8 << 20


@pytest.mark.gpu
def test_kernels_count_without_their_launch() -> None:
    """Sixteen times the bytes take about as many times as long, also where both take less than a launch."""
    small, large = (torch.empty(mib << 20, dtype=torch.uint8, device="cuda") for mib in (16, 256))
    less, more = compare_kernels(small.zero_, large.zero_, torch.device("cuda"), 20)
    assert 6 < more.median / less.median < 20
