"""`last`: all that a stopped run needs to go on exactly.

Random numbers are not in it: those of a step are drawn from (seed, step, rank) alone (`seed_step`), and the
loader's order from the seed and the step's number. So a run may also go on with another number of GPUs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsg.model.network.atomic import replacing
from dsg.model.training.config import Recipe
from dsg.model.training.ema import Ema
from dsg.model.training.errors import TrainingError
from dsg.model.training.recipe_file import to_table

_FORMAT = 1
# What may change between the parts of a run: the length of the schedule, and what does not decide what is learned.
_FREE = (
    "name",
    "run",
    "schedule",
    "validation",
    "batch.accumulate",
    "batch.workers",
    "batch.cache_images",
    "predict.score_threshold",
    "predict.precision",
)
_MISSING = "nothing"


@dataclass
class TrainState:
    """Everything that changes while a network trains."""

    model: nn.Module
    """The network itself, not its distributed wrapper."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Loss scaling of fp16; switched off elsewhere."""
    ema: Ema | None = None
    iteration: int = 0
    """Optimiser steps done."""
    best_ap: float = -1.0
    """Best validation AP so far, 0 to 1; -1 before the first."""
    stale_validations: int = 0
    """Validations since the best one."""
    validated_at: int = 0
    """Steps done at the last validation, so that a run stopped just before one makes up for it."""
    seconds: float = 0.0
    """Time spent in training over all parts of the run."""
    origin: dict[str, str] = field(default_factory=dict)
    """Name and licence of the weights that the run began with, which a resume must not forget; see
    `release`."""

    @property
    def shipped_model(self) -> nn.Module:
        """The weights that are validated and shipped: the moving average, where there is one."""
        return self.ema.module if self.ema else self.model


def save_state(path: Path, state: TrainState, recipe: Recipe, data_digest: str) -> None:
    """Writes `last` so that at every moment the file is either the old one or the new one, whole.

    Args:
        path: file to replace.
        state: of the run.
        recipe: kept so that a resume can refuse another one.
        data_digest: of the training images and categories, for the same reason.
    """
    content = {
        "format": _FORMAT,
        "recipe": to_table(recipe),
        "data_digest": data_digest,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": state.ema.state_dict() if state.ema else None,
        "iteration": state.iteration,
        "best_ap": state.best_ap,
        "stale_validations": state.stale_validations,
        "validated_at": state.validated_at,
        "seconds": state.seconds,
        "origin": state.origin,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_state(path: Path, state: TrainState, recipe: Recipe, data_digest: str) -> None:
    """Puts what `save_state` wrote into `state`, in place.

    Raises:
        TrainingError: no file, not a readable one, or the recipe or the data differ from those of the run so
            far.
    """
    if not path.is_file():
        raise TrainingError(f"--resume: {path} does not exist; start without --resume, or give the run's own --out")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors have no common type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"--resume: {path} cannot be read ({reason}); start anew in another --out") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise TrainingError(f"--resume: {path} is no resume file of this version; start anew in another --out")
    _same_recipe(path, content["recipe"], to_table(recipe))
    if content["data_digest"] != data_digest:
        raise TrainingError(
            f"--resume: the training data are not those of {path} (images or categories differ);"
            " give the same --data, or start in another --out"
        )
    try:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.ema:
            state.ema.load_state_dict(content["ema"])
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"--resume: {path} holds another network: {str(error).splitlines()[0]}") from None
    if content["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(content["scaler"])
    state.iteration = content["iteration"]
    state.best_ap = content["best_ap"]
    state.stale_validations = content["stale_validations"]
    state.validated_at = content["validated_at"]
    state.seconds = content["seconds"]
    state.origin = content["origin"]


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Starts PyTorch's random numbers, on all devices, for one optimiser step of one process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0] >> 1))


def _same_recipe(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(now)
    for key in sorted(old | new):
        is_free = key != "run.seed" and any(key == free or key.startswith(f"{free}.") for free in _FREE)
        if not is_free and old.get(key, _MISSING) != new.get(key, _MISSING):
            raise TrainingError(
                f"--resume: {key} was {old.get(key, _MISSING)} in {path} and is {new.get(key, _MISSING)} now;"
                " set it back, or start in another --out"
            )


def _flat(table: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat
