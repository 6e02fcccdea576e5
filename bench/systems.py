"""Every system trained alike, side by side: what guidance brings to each."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsg.bench.report import Row


@dataclass(frozen=True)
class System:
    """One run of the comparison."""

    name: str
    """As tables call it."""
    model: str
    """Preset, `{backbone}` to be filled in."""
    baseline: str
    """Which system it is compared with; its own name for none."""
    override: str = ""
    """A switch on top of the preset."""


SYSTEMS = (
    System("Mask R-CNN", "mask_rcnn_{backbone}_fpn", "Mask R-CNN"),
    System("DSG", "dsg_{backbone}_fpn", "Mask R-CNN"),
    System("Cascade Mask R-CNN", "cascade_mask_rcnn_{backbone}_fpn", "Cascade Mask R-CNN"),
    System("Cascade DSG", "cascade_dsg_{backbone}_fpn", "Cascade Mask R-CNN"),
    System("HTC", "htc_{backbone}_fpn", "HTC"),
    System("HTC DSG", "htc_dsg_{backbone}_fpn", "HTC"),
    System("DSC", "dsc_{backbone}_fpn", "HTC"),
    System("Mask Scoring R-CNN", "mask_rcnn_{backbone}_fpn", "Mask R-CNN", "mask_iou"),
    System("PANet", "mask_rcnn_{backbone}_fpn", "Mask R-CNN", "panet"),
)


def chosen(names: Sequence[str]) -> list[System]:
    """Systems by name, with those that they are compared with; none named are all. ValueError for an unknown one."""
    by_name = {system.name: system for system in SYSTEMS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"unknown system {unknown[0]!r}; known are {', '.join(by_name)}")
    wanted = {*names, *(by_name[name].baseline for name in names)} or set(by_name)
    return [system for system in SYSTEMS if system.name in wanted]


def run(
    systems: Sequence[System],
    train_options: Sequence[str],
    runs: Path,
    *,
    backbone: str,
    side_by_side: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Train each system in a process of its own, and compare what they scored at the end.

    Runs that are finished in `runs` are not repeated, and stopped ones go on.

    Args:
        train_options: of `dsg train`, without --out and --resume.
        runs: folder of the runs, a folder a system.
        side_by_side: how many at once, on one device.

    Raises:
        ValueError: runs that failed, with their logs.
    """
    runs.mkdir(parents=True, exist_ok=True)

    def train(system: System) -> str | None:
        folder = runs / system.name.lower().replace(" ", "_")
        if final_scores(folder):
            say(f"{system.name}: finished before")
            return None
        command = [sys.executable, "-m", "dsg.cli", "train", *train_options, "--out", str(folder)]
        command += ["--set", f"model={system.model.format(backbone=backbone)}"]
        command += ["--set", f"overrides.{system.override}=true"] if system.override else []
        command += ["--resume"] if (folder / "last").exists() else []
        log = runs / f"{folder.name}.log"
        say(f"{system.name}: {log}")
        with log.open("a", encoding="utf-8") as lines:
            done = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, check=False)
        return None if done.returncode == 0 and final_scores(folder) else f"{system.name} ({log})"

    with ThreadPoolExecutor(side_by_side) as pool:
        failed = [name for name in pool.map(train, systems) if name]
    if failed:
        raise ValueError(f"not finished: {', '.join(failed)}; run it again to go on")
    scores = {system.name: final_scores(runs / system.name.lower().replace(" ", "_")) for system in systems}
    return [
        Row(
            f"{system.name}, {'box' if kind == 'bbox' else 'mask'} AP; baseline {system.baseline}",
            round(100 * scores[system.name][kind], 2),
            "AP",
            round(100 * scores[system.baseline][kind], 2),
            round(scores[system.name][kind] / max(scores[system.baseline][kind], 1e-9), 3),
        )
        for system in systems
        for kind in ("bbox", "segm")
    ]


def final_scores(folder: Path) -> dict[str, float]:
    """Box and mask AP, 0 to 1, of a finished run's last validation; {} where it is not finished."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return {}
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    if not validations:
        return {}
    last = validations[-1]
    return {kind: float(last.get(f"{kind}/AP", 0.0)) for kind in ("bbox", "segm")}
