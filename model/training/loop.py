"""The training loop, start to end: batch, losses, gradients, step, average, log, validation, checkpoint."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision.transforms.v2.functional import to_dtype

from dsg.model.data.packed import Batch
from dsg.model.training import distributed
from dsg.model.training.checkpoint import TrainState, seed_step
from dsg.model.training.config import Recipe
from dsg.model.training.errors import TrainingError
from dsg.model.training.graphs import capture
from dsg.model.training.guidance import raise_guidance
from dsg.model.training.log import TrainingLog
from dsg.model.training.optim import Schedule, clip_gradients, set_learning_rate
from dsg.model.training.stop import StopRequest

Metrics = dict[str, float]  # what a validation measured; "AP" is the one that chooses the best weights


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out for; on every process alike."""

    validate: Callable[[nn.Module], Metrics]
    """AP of a network in eval mode; the same numbers on every process."""
    save_best: Callable[[nn.Module, Metrics], None]
    """Keeps these weights as the best so far."""
    save_last: Callable[[], None]
    """Writes the resume file."""


class TrainLoop:
    """Trains from `state.iteration` to the schedule's end, or until something asks it to stop.

    Args:
        state: network, optimiser and counts, on `device`; changed in place.
        batches: this process's part of each step's images, from step `state.iteration` on, without end; on `device`.
        schedule: length and learning rates.
        recipe: everything else.
        hooks: validation and checkpoints.
        log: where numbers go.
        device: where the network is.
        ranks: this process among all.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Iterable[Batch],
        schedule: Schedule,
        recipe: Recipe,
        hooks: Hooks,
        log: TrainingLog,
        *,
        device: torch.device,
        ranks: distributed.Ranks,
    ) -> None:
        self.state, self.schedule, self.recipe = state, schedule, recipe
        self.hooks, self.log, self.device, self.ranks = hooks, log, device, ranks
        self.precision = precision_of(device, recipe.run.precision)
        state.model.train()
        alone = device.type == "cuda" and ranks.world_size == 1 and recipe.batch.accumulate == 1
        if alone and recipe.augment.same_shape:
            capture(state.model, recipe.batch.images, recipe.augment.crop_size, self.precision)
        self.network = distributed.wrap(state.model, ranks)
        self.window = _Window()
        self.batches = iter(batches)

    def run(self) -> str:
        """Runs to the end.

        Returns:
            Why it ended: "finished", "no better AP ...", or the reason of a stop; in every case `last` is
            written.

        Raises:
            TrainingError: a loss or gradient that is not finite, or no GPU memory left; `last` stays as it
                was before.
        """
        state, every, patience = self.state, self.recipe.validation.every, self.recipe.validation.patience
        with StopRequest(self.recipe.run.max_seconds) as stop:
            while True:
                is_end = state.iteration >= self.schedule.iterations
                if (is_end or _is_due(state.iteration, every)) and state.validated_at != state.iteration:
                    self._validate()
                if is_end:
                    return "finished"
                if patience and state.stale_validations >= patience:
                    return f"no better AP in {patience} validations"

                is_asked = self._step_and_count(stop)
                if is_asked or _is_due(state.iteration, self.recipe.run.save_every):
                    self.hooks.save_last()
                if is_asked:
                    return stop.reason or "stopped with another process"

    def _step_and_count(self, stop: StopRequest) -> bool:
        state, started = self.state, time.monotonic()
        try:
            values, is_asked = self._step(stop)
        except torch.OutOfMemoryError:
            raise TrainingError(self._out_of_memory()) from None
        state.iteration += 1
        seconds = time.monotonic() - started
        state.seconds += seconds
        self.window.add(values, self.recipe.batch.images, seconds)
        self.log.advance(state.iteration)
        if _is_due(state.iteration, self.recipe.run.log_every) or state.iteration == self.schedule.iterations:
            self.log.train(state.iteration, self.window.take(self.device))
        return is_asked

    def _step(self, stop: StopRequest) -> tuple[Metrics, bool]:
        """One optimiser step. Returns what it measured, and whether any process was asked to stop."""
        state, parts = self.state, self.recipe.batch.accumulate
        factor = self.schedule.factor(state.iteration)
        set_learning_rate(state.optimizer, factor)
        seed_step(self.recipe.run.seed, state.iteration, self.ranks.rank)
        averages = [state.ema.module] if state.ema else []
        raise_guidance([state.model, *averages], state.iteration, self.schedule.warmup_iterations)
        sums: dict[str, Tensor] = {}
        for part, (images, targets) in enumerate(self._next_parts(parts)):
            # Earlier parts' gradients stay on this process; the last backward averages their sum over all.
            network, is_last = self.network, part == parts - 1
            with network.no_sync() if isinstance(network, DDP) and not is_last else nullcontext():
                with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                    losses = network(images, targets)
                total = torch.stack([loss.float() for loss in losses.values()]).sum() / parts
                state.scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float() / parts
        state.scaler.unscale_(state.optimizer)
        norm = clip_gradients(state.model, self.recipe.optimizer.clip_norm)

        # One transfer for all numbers, after backward and before the weights change.
        asked = torch.tensor(float(bool(stop.reason)), device=self.device)
        numbers = distributed.mean_over_ranks(torch.stack([*sums.values(), norm.float(), asked]))
        values, grad_norm = dict(zip(sums, numbers[:-2], strict=True)), numbers[-2]
        self._refuse_non_finite(values, grad_norm)
        state.scaler.step(state.optimizer)  # leaves the weights alone when fp16 gradients overflowed
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(state.model)
        lr = state.optimizer.defaults["lr"] * factor  # groups may run at multiples of it
        return {"loss": sum(values.values()), **values, "grad_norm": grad_norm, "lr": lr}, numbers[-1] > 0

    def _next_parts(self, parts: int) -> Iterator[Batch]:
        """The next step's images in `parts` equal lists: float [3, h, w] in 0..1, with their targets, on the
        device.
        """
        started = time.monotonic()
        images, targets = next(self.batches)
        self.window.waited_s += time.monotonic() - started
        size = len(images) // parts
        for first in range(0, len(images), size):
            chosen = slice(first, first + size)
            yield [to_dtype(image, torch.float32, scale=True) for image in images[chosen]], targets[chosen]

    def _validate(self) -> None:
        """Measures the shipped weights, and keeps them if they are the best so far."""
        state = self.state
        self.hooks.save_last()  # a validation takes a while, and may be what memory runs out in
        model = state.shipped_model.eval()
        try:
            metrics = self.hooks.validate(model)
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"validation at {state.iteration}: out of GPU memory: lower validation.batch"
                f" (now {self.recipe.validation.batch}) and go on with --resume"
            ) from None
        state.model.train()
        state.validated_at = state.iteration
        is_best = metrics["AP"] > state.best_ap
        if is_best:
            state.best_ap, state.stale_validations = metrics["AP"], 0
            self.hooks.save_best(model, metrics)
        else:
            state.stale_validations += 1
        self.log.validation(state.iteration, metrics, is_best)
        self.hooks.save_last()

    def _refuse_non_finite(self, losses: Metrics, grad_norm: float) -> None:
        where = f"iteration {self.state.iteration}: "
        kept = "; the weights of `last` from before are kept: lower optimizer.lr"
        for name, value in losses.items():
            if not math.isfinite(value):
                raise TrainingError(f"{where}{name} is {value}{kept}, set optimizer.clip_norm, or check the data")
        if not math.isfinite(grad_norm) and not self.state.scaler.is_enabled():
            raise TrainingError(f"{where}the gradients' norm is {grad_norm}{kept} or use run.precision=fp32")

    def _out_of_memory(self) -> str:
        batch = self.recipe.batch
        at_once = batch.images // (self.ranks.world_size * batch.accumulate)
        return (
            f"iteration {self.state.iteration}: out of GPU memory with {at_once} images at once:"
            f" raise batch.accumulate (now {batch.accumulate}), or lower batch.images (now {batch.images})"
            " or the image sizes in [augment]"
        )


def precision_of(device: torch.device, precision: str) -> torch.dtype:
    """The type that the forward pass computes in, for a recipe's `run.precision`."""
    if device.type != "cuda" or precision == "fp32":
        return torch.float32
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _is_due(iteration: int, every: int) -> bool:
    return bool(every) and iteration > 0 and iteration % every == 0


class _Window:
    """Means of what the steps measured since the last line of the log."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = self._images = 0
        self._seconds = 0.0

    def add(self, values: Metrics, images: int, seconds: float) -> None:
        """One step's numbers, how many images it saw, and how long it took."""
        for name, value in values.items():
            self._sums[name] += value
        self._steps += 1
        self._images += images
        self._seconds += seconds

    def take(self, device: torch.device) -> Metrics:
        """The means, with speed, the share of time spent waiting for pictures, and memory in GiB; starts
        anew."""
        means = {name: value / self._steps for name, value in self._sums.items()}
        seconds = max(self._seconds, 1e-9)
        means |= {"images_per_s": self._images / seconds, "data_wait": min(1.0, self.waited_s / seconds)}
        if device.type == "cuda":
            means["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self.__init__()  # type: ignore[misc]
        return means
