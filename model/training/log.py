"""What a run leaves to read: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class TrainingLog:
    """One run's log. Only the main process writes; in others every call does nothing.

    metrics.jsonl holds one JSON object a line: ``{"kind": "train" | "validation", "iteration": n,
    ...numbers}``. What a stopped run wrote after its `last` is taken out when it goes on, since those steps
    are done again.
    """

    def __init__(
        self, folder: Path, start: int, total: int, is_main: bool = True, console: Console | None = None
    ) -> None:
        """
        Args:
            folder: where metrics.jsonl and the TensorBoard events go.
            start: steps done before; 0 begins metrics.jsonl anew.
            total: steps of the whole run.
            is_main: False makes every call do nothing.
            console: where lines go; None is stderr.
        """
        self._is_main = is_main
        self._console = console or Console(stderr=True, highlight=False)
        self._total = total
        self._progress: Progress | None = None
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        kept = _lines_until(metrics, start) if start else []
        metrics.write_text("".join(kept), encoding="utf-8")
        self._metrics = metrics.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total, completed=start)
            self._progress.start()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        if self._progress:
            self._progress.stop()
        self._metrics.close()
        self._board.close()

    def advance(self, iteration: int) -> None:
        """Moves the progress bar to `iteration` steps done."""
        if self._progress:
            self._progress.update(self._task, completed=iteration)

    def train(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes what training measured up to `iteration`: losses, lr, grad_norm, images_per_s and so on."""
        if not self._is_main:
            return
        self._record("train", iteration, values)
        line = f"loss {values['loss']:.3f}  lr {values['lr']:.2e}  {values['images_per_s']:.1f} images/s"
        if self._progress:
            self._progress.update(self._task, description=line)
        else:
            self.say(f"iteration {iteration}/{self._total}  {line}")

    def validation(self, iteration: int, values: Mapping[str, float], is_best: bool) -> None:
        """Writes the AP of the weights after `iteration` steps."""
        if not self._is_main:
            return
        self._record("validation", iteration, values)
        shown = [f"{name} {value:.3f}" for name, value in values.items() if name.endswith(("/AP", "/AP50"))]
        best = "  (best so far)" if is_best else ""
        self.say(f"validation at {iteration}: {'  '.join(shown) or 'nothing to measure'}{best}")

    def say(self, text: str) -> None:
        """Shows one line to the person who started the run."""
        if self._is_main:
            self._console.print(text, markup=False, soft_wrap=True)

    def _record(self, kind: str, iteration: int, values: Mapping[str, float]) -> None:
        # NaN and infinity are no JSON; a skipped fp16 step has an infinite gradient norm
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"kind": kind, "iteration": iteration, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, iteration)


def _lines_until(metrics: Path, iteration: int) -> list[str]:
    """The lines of `metrics` of at most `iteration` steps; a line cut off by a crash is dropped."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["iteration"] <= iteration:
            kept.append(line + "\n")
    return kept
