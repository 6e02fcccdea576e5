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


@dataclass(frozen=True)
class Run:
    """One training: a system from one seed."""

    system: System
    seed: int
    folder: Path

    @property
    def best(self) -> Path:
        """Its weights."""
        return self.folder / "best.safetensors"


def planned(systems: Sequence[System], seeds: Sequence[int], runs: Path) -> list[Run]:
    """Each system from each seed, in a folder of its own, seeds outermost so that early ones can be looked at."""
    return [
        Run(system, seed, runs / f"{system.name.lower().replace(' ', '_')}_seed{seed}")
        for seed in seeds
        for system in systems
    ]


def train(
    plan: Sequence[Run], train_options: Sequence[str], *, backbone: str, side_by_side: int, say: Callable[[str], None]
) -> None:
    """Train each run in a process of its own. Finished ones are not repeated, and stopped ones go on.

    Args:
        train_options: of `dsg train`, without --out and --resume.
        side_by_side: how many at once, on one device.

    Raises:
        ValueError: runs that failed, with their logs.
    """

    def train_one(run: Run) -> str | None:
        system, folder = run.system, run.folder
        if final_scores(folder):
            say(f"{folder.name}: finished before")
            return None
        command = [sys.executable, "-m", "dsg.cli", "train", *train_options, "--out", str(folder)]
        command += ["--set", f"model={system.model.format(backbone=backbone)}", "--set", f"run.seed={run.seed}"]
        command += ["--set", f"overrides.{system.override}=true"] if system.override else []
        command += ["--resume"] if (folder / "last").exists() else []
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        say(f"{folder.name}: {log}")
        with log.open("a", encoding="utf-8") as lines:
            done = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, check=False)
        return None if done.returncode == 0 and final_scores(folder) else f"{folder.name} ({log})"

    with ThreadPoolExecutor(side_by_side) as pool:
        failed = [name for name in pool.map(train_one, plan) if name]
    if failed:
        raise ValueError(f"not finished: {', '.join(failed)}; run it again to go on")


def compare(plan: Sequence[Run], title: str) -> list[Row]:
    """AP of every finished run beside the run that its system is compared with, of the same seed, and their means.

    Args:
        title: what the cases begin with: the recipe's name.
    """
    scores = {(run.system.name, run.seed): final_scores(run.folder) for run in plan}
    seeds = list(dict.fromkeys(run.seed for run in plan))
    rows = []
    for system in dict.fromkeys(run.system for run in plan):
        for kind, what in (("bbox", "box"), ("segm", "mask")):
            pairs = [(scores[system.name, seed][kind], scores[system.baseline, seed][kind]) for seed in seeds]
            cases = [(f"seed {seed}", *pair) for seed, pair in zip(seeds, pairs, strict=True)]
            if len(seeds) > 1:
                means = (sum(side) / len(seeds) for side in zip(*pairs, strict=True))
                cases.append((f"mean of {len(seeds)} seeds", *means))
            for which, own, other in cases:
                case = f"{title}: {system.name}, {what} AP, {which}; baseline {system.baseline}"
                rows.append(
                    Row(case, round(100 * own, 2), "AP", round(100 * other, 2), round(own / max(other, 1e-9), 3))
                )
    return rows


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
