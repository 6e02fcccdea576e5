"""A whole training run: data, network, loop, checkpoints. What `dsg train` calls."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from dsg.model.data.dataset import CocoDataset
from dsg.model.data.loader import build_train_loader
from dsg.model.data.records import CocoData
from dsg.model.data.transforms import Augment
from dsg.model.network.build import build
from dsg.model.network.detector import Detector
from dsg.model.training import distributed
from dsg.model.training.checkpoint import TrainState, load_state, save_state
from dsg.model.training.config import Recipe
from dsg.model.training.ema import Ema
from dsg.model.training.errors import TrainingError
from dsg.model.training.initial import initialise
from dsg.model.training.log import TrainingLog
from dsg.model.training.loop import Hooks, Metrics, TrainLoop, precision_of
from dsg.model.training.optim import Schedule, build_optimizer
from dsg.model.training.release import describe, origin_of, save_best
from dsg.model.training.sources import PathLike, digest_of, first_pictures, read_sets, write_held_out
from dsg.model.training.validate import Validation


def train(
    recipe: Recipe,
    data: Sequence[PathLike],
    images: Sequence[PathLike | None] = (),
    *,
    out: PathLike,
    val: Sequence[PathLike] = (),
    val_images: Sequence[PathLike | None] = (),
    init: str | None = None,
    resume: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> Path:
    """Trains a network; writes `best.safetensors`, `last`, metrics.jsonl and TensorBoard events into `out`.

    Under torchrun every process calls this; the first one writes.

    Args:
        recipe: what `load_recipe` gives.
        data: COCO files, joined by category name.
        images: folder of each file's pictures, in the same order; None or too few: `images/` beside the file.
        out: folder of the run; its name becomes the name of the weights.
        val, val_images: the same for validation; without `val` a tenth of the pictures, by a hash of the
            image id, which is also written to `out`/held_out.json.
        init: weights to start from: a name that `dsg models` lists, a checkpoint, or a backbone's weight file.
            Without effect where `resume` is set.
        resume: go on from `out`/last.
        device: "cpu", "cuda" or "cuda:1"; None takes a GPU if there is one.
        console: where lines go; None is stderr.

    Returns:
        `out`/best.safetensors, or `out`/last where the run was stopped before its first validation.

    Raises:
        TrainingError: the run cannot start or go on; `last` keeps the state before.
        DataError: data that cannot be used.
        ValueError: preset, overrides or weights that do not go together.
    """
    out = Path(out)
    if not resume and (out / "last").exists():
        raise TrainingError(f"{out} holds a run already: give --resume to go on with it, or another --out")
    train_set, val_set = read_sets(data, images, val, val_images)
    with distributed.processes(device) as (ranks, chosen):
        _check_batch(recipe, ranks)
        torch.manual_seed(recipe.run.seed)
        model = build_network(recipe, len(train_set.categories))
        _check_maps(recipe, model)
        begun = "init: random numbers; --init BACKBONE.safetensors learns much faster"
        if init and not resume:
            begun = initialise(model, init)
        state = _fresh_state(model, recipe, chosen)
        digest = digest_of(train_set)
        if resume:
            load_state(out / "last", state, recipe, digest)  # its origin, too: --init is not needed again
            begun = f"resumed {out / 'last'} at iteration {state.iteration}"
        else:
            state.origin = origin_of(init)

        workers = min(recipe.batch.workers, max(1, (os.cpu_count() or 1) // ranks.world_size))
        augment = Augment(recipe.augment)
        loader = build_train_loader(
            CocoDataset(
                train_set,
                augment,
                seed=recipe.run.seed,
                cache_images=recipe.batch.cache_images,
                maps=Path(recipe.batch.stuff_maps) if recipe.batch.stuff_maps else None,
            ),
            recipe.batch.images,
            seed=recipe.run.seed,
            workers=workers,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start=state.iteration,
            repeat_below=recipe.batch.repeat_below,
        )
        schedule = Schedule.of(recipe.schedule, loader.batches_per_epoch)
        info = describe(recipe, model, train_set, name=out.resolve().name, files=data, origin=state.origin)
        validation = Validation(
            first_pictures(val_set, recipe.validation.images),
            info,
            ranks,
            batch=recipe.validation.batch,
            threads=max(1, workers),
            max_detections=recipe.validation.max_detections,
            precision=recipe.predict.precision,
        )
        best, last = out / "best.safetensors", out / "last"

        def keep_best(network: nn.Module, metrics: Metrics) -> None:
            if ranks.is_main:
                if recipe.predict.precision:
                    log.say(f"lowest score that is shown by default: {validation.info.threshold_in_words}")
                save_best(
                    best, network, validation.info, iteration=state.iteration, metrics=metrics, half=recipe.run.half
                )

        def keep_last() -> None:
            if ranks.is_main:
                save_state(last, state, recipe, digest)

        with TrainingLog(out, state.iteration, schedule.iterations, ranks.is_main, console) as log:
            for line in [*_opening(recipe, schedule, train_set, validation, chosen, ranks), begun]:
                log.say(line)
            if ranks.is_main and not val and not resume:
                write_held_out(out / "held_out.json", val_set)
            hooks = Hooks(validation, keep_best, keep_last)
            reason = TrainLoop(state, loader.on(chosen), schedule, recipe, hooks, log, device=chosen, ranks=ranks).run()
            result = best if state.best_ap >= 0 else last
            log.say(f"{reason}: {state.iteration} of {schedule.iterations} iterations, {result}")
    return result


def build_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network with fresh weights: a preset with overrides, or what its Python file builds.

    Raises:
        TrainingError: the Python file's `build` gives no module.
        ValueError: preset and overrides do not go together.
    """
    if recipe.build_file is None:
        return build(recipe.model, num_classes, max_detections=recipe.predict.max_detections, **recipe.overrides)
    spec = importlib.util.spec_from_file_location(recipe.build_file.stem, recipe.build_file)
    assert spec and spec.loader  # a .py file always has them
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.build(num_classes)
    if not isinstance(network, nn.Module):
        raise TrainingError(
            f"{recipe.build_file}: build(num_classes) gave {type(network).__name__}; it must return a torch nn.Module"
        )
    return network


def _check_maps(recipe: Recipe, model: nn.Module) -> None:
    if isinstance(model, Detector) and model.config.semantic == "stuff" and not recipe.batch.stuff_maps:
        raise TrainingError(
            'overrides.semantic = "stuff" learns from semantic maps: give their folder as batch.stuff_maps, or use'
            ' overrides.semantic = "instances"'
        )


def _check_batch(recipe: Recipe, ranks: distributed.Ranks) -> None:
    parts = ranks.world_size * recipe.batch.accumulate
    if recipe.batch.images % parts:
        raise TrainingError(
            f"batch.images = {recipe.batch.images} cannot be shared by {ranks.world_size} processes in"
            f" {recipe.batch.accumulate} parts each: make it a multiple of {parts}"
        )


def _fresh_state(model: nn.Module, recipe: Recipe, device: torch.device) -> TrainState:
    if device.type == "cuda":
        model.to(device).to(memory_format=torch.channels_last)  # what tensor cores convolve fastest
        # No cuDNN autotuning: the number of RoIs is another one at every step, and each would be tried out
        # anew (seconds a step, where the step itself takes a fifth of one).
        torch.backends.cudnn.benchmark = False
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer, recipe.batch.images),
        scaler=torch.amp.GradScaler(device.type, enabled=precision_of(device, recipe.run.precision) == torch.float16),
        ema=Ema(model, recipe.ema.decay) if recipe.ema.decay else None,
    )


def _opening(
    recipe: Recipe,
    schedule: Schedule,
    data: CocoData,
    validation: Validation,
    device: torch.device,
    ranks: distributed.Ranks,
) -> list[str]:
    """What a person wants to see before the long wait."""
    objects = sum(len(record.annotations) for record in data.records)
    processes = f" in {ranks.world_size} processes" if ranks.world_size > 1 else ""
    lines = [
        f"recipe {recipe.name}: {recipe.model if recipe.build_file is None else recipe.build_file},"
        f" {schedule.iterations} iterations of {recipe.batch.images} images on {device}{processes}",
        f"training on {len(data.records)} pictures with {objects} objects of {len(data.categories)} categories",
        f"validating on {len(validation.data.records)} pictures, AP with {validation.max_detections} detections",
    ]
    cap = recipe.predict.max_detections
    if validation.fullest > cap:
        lines.append(
            f"note: a validation picture holds {validation.fullest} objects, the network gives at most {cap}:"
            f" predict.max_detections={validation.fullest} would let it find them all"
        )
    return lines
