"""What a training run is told: a `Recipe`, read from TOML. Each field's doc names its unit.

Reading and `--set` live in `recipe_file`; this file holds the fields, their defaults and what must hold
between them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsg.model.data.transforms import AugmentConfig
from dsg.model.network.presets import preset_config


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients change the weights. Defaults are maskrcnn-benchmark's."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """sgd (with momentum) or adamw."""
    lr: float = 0.02
    """Full learning rate, reached after the warm-up."""
    lr_for_batch: int = 0
    """Images per step that `lr` is meant for: the rate is scaled linearly to the batch. 0: `lr` as it is."""
    momentum: float = 0.9
    """SGD's momentum; AdamW keeps PyTorch's betas (0.9, 0.999)."""
    weight_decay: float = 1e-4
    """Decay of weights."""
    bias_lr_factor: float = 2.0
    """Rate of biases, as a multiple of `lr`."""
    bias_weight_decay: float = 0.0
    """Decay of biases."""
    norm_weight_decay: float = 0.0
    """Decay of the scale and shift of normalisation layers that train."""
    backbone_lr_factor: float = 1.0
    """Rate of the backbone, as a multiple of the rest's."""
    clip_norm: float = 0.0
    """Largest L2 norm of all gradients together; longer ones are scaled down. 0: no clipping."""

    def __post_init__(self) -> None:
        _positive("optimizer.lr", self.lr)
        _not_negative("optimizer", self, "lr_for_batch", "weight_decay", "bias_lr_factor", "bias_weight_decay")
        _not_negative("optimizer", self, "norm_weight_decay", "backbone_lr_factor", "clip_norm")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}; it must lie in 0 to below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long a run is and how the rate moves."""

    iterations: int = 0
    """Length in optimiser steps; 0 where `epochs` gives it."""
    epochs: int = 0
    """Length in passes over the training set; 0 where `iterations` gives it."""
    decay: Literal["steps", "cosine"] = "steps"
    """steps: times `gamma` at each of `steps`; cosine: half a cosine down to `final_factor`."""
    steps: tuple[int, ...] = ()
    """Where the rate falls, in the unit of the length (iterations or epochs)."""
    gamma: float = 0.1
    """Factor at each of `steps`."""
    final_factor: float = 0.0
    """Share of the rate at the end of a cosine."""
    warmup_iterations: int = 500
    """Steps of linear warm-up, whatever the unit of the length; 0: none."""
    warmup_factor: float = 1 / 3
    """Share of the rate at the first step."""

    def __post_init__(self) -> None:
        _not_negative("schedule", self, "iterations", "epochs", "gamma", "warmup_iterations")
        if bool(self.iterations) == bool(self.epochs):
            raise ValueError(
                f"schedule has iterations = {self.iterations} and epochs = {self.epochs}: set one of them, the other 0"
            )
        length = self.iterations or self.epochs
        if list(self.steps) != sorted(set(self.steps)) or any(not 0 < step < length for step in self.steps):
            raise ValueError(f"schedule.steps {list(self.steps)} must rise and lie within 1 to {length - 1}")
        if self.decay == "cosine" and self.steps:
            raise ValueError("schedule.steps has no meaning with decay = 'cosine': use steps = []")
        for name in ("warmup_factor", "final_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name} is {getattr(self, name)}; it is a share of the rate, 0 to 1")


@dataclass(frozen=True)
class BatchConfig:
    """What one optimiser step sees."""

    images: int = 16
    """Images per optimiser step, over all GPUs and all accumulated parts."""
    accumulate: int = 1
    """Parts that a step is computed in, one after another, to save memory."""
    workers: int = 4
    """Processes per GPU that read and augment pictures, at most one a CPU core; 0 does it in the training
    process."""
    repeat_below: float = 0.0
    """Share of the pictures, 0 to 1: pictures with a class that fewer show come up more often (repeat-factor sampling);
    0: all equally often."""
    cache_images: bool = False
    """Keep all training pictures decoded in memory: 3 bytes a pixel."""
    stuff_maps: str = ""
    """Folder of semantic maps of the training pictures, for networks with overrides.semantic = "stuff": PNG files named
    as the pictures, the class of each pixel, 255 unknown. Empty: none."""

    def __post_init__(self) -> None:
        _positive("batch.images", self.images)
        _positive("batch.accumulate", self.accumulate)
        _not_negative("batch", self, "workers")
        if not 0 <= self.repeat_below <= 1:
            raise ValueError(f"batch.repeat_below is {self.repeat_below}; it is a share of the pictures, 0 to 1")
        if self.images % self.accumulate:
            raise ValueError(f"batch.images = {self.images} is no multiple of batch.accumulate = {self.accumulate}")


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights: what is validated and shipped."""

    decay: float = 0.0
    """Share of the old average that a step keeps, such as 0.999; 0: the last weights are used as they are."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must lie in 0 to below 1")


@dataclass(frozen=True)
class ValidationConfig:
    """When and how AP is measured during training."""

    every: int = 0
    """Optimiser steps between two validations; 0: at the end only."""
    images: int = 0
    """Pictures of the validation set that are used, the first by image id; 0: all."""
    batch: int = 4
    """Pictures that go through the network at once."""
    max_detections: int = 0
    """Detections per picture that AP counts; 0: the larger of 100 and the fullest picture's objects, up to
    the network's cap."""
    patience: int = 0
    """Validations without a better AP after which the run stops; 0: never."""

    def __post_init__(self) -> None:
        _not_negative("validation", self, "every", "images", "max_detections", "patience")
        _positive("validation.batch", self.batch)
        if self.patience and not self.every:
            raise ValueError("validation.patience needs validations during training: set validation.every")


@dataclass(frozen=True)
class PredictConfig:
    """What the checkpoint says about its own use; validation uses the same."""

    short_side: int = 800
    """Pixels: a picture's short side after resizing, unless the long side would pass its limit."""
    long_side: int = 1333
    """Pixels: limit of the long side."""
    score_threshold: float = 0.5
    """Lowest score that `predict` and the service show by default, 0 to 1; without effect where `precision` is set."""
    precision: float = 0.0
    """Share of the shown detections that should be right, 0 to 1: the default threshold of each class is chosen for
    it on the validation results. 0: `score_threshold` for all."""
    eval_score_threshold: float = 0.001
    """Lowest score that counts in AP; the paper's."""
    max_detections: int = 100
    """Most detections of one picture."""

    def __post_init__(self) -> None:
        _positive("predict.short_side", self.short_side)
        _positive("predict.max_detections", self.max_detections)
        if self.long_side < self.short_side:
            raise ValueError(
                f"predict.long_side = {self.long_side} is below predict.short_side = {self.short_side}: swap them"
            )
        for name in ("score_threshold", "eval_score_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"predict.{name} is {getattr(self, name)}; a score lies in 0 to 1")
        if not 0 <= self.precision <= 1:
            raise ValueError(f"predict.precision is {self.precision}; it is a share of detections, 0 (off) to 1")


@dataclass(frozen=True)
class RunConfig:
    """How the run goes on its machine; none of it changes what is learned but `precision` and `seed`."""

    seed: int = 0
    """Start of every random number: order, augmentation, sampling, fresh weights."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic on the GPU: auto is bf16 where the GPU has it, else fp16. On the CPU it is always fp32."""
    log_every: int = 20
    """Optimiser steps between two lines of the log."""
    save_every: int = 500
    """Optimiser steps between two writes of `last`."""
    max_seconds: float = 0.0
    """Stop at a checkpoint after this long, to be resumed; 0: no limit. The schedule does not change."""
    half: bool = False
    """Write `best.safetensors` in half precision."""

    def __post_init__(self) -> None:
        _positive("run.log_every", self.log_every)
        _positive("run.save_every", self.save_every)
        _not_negative("run", self, "seed", "max_seconds")


@dataclass(frozen=True)
class Recipe:
    """One whole training run but its data files."""

    name: str = "custom"
    """Name of the recipe: the file's stem."""
    model: str = "dsg_r50_fpn"
    """Preset of the network; unused where `build_file` is set."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """The preset's numbers that differ, by name."""
    build_file: Path | None = None
    """A Python file with `build(num_classes) -> nn.Module` in place of a preset."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(iterations=90_000))
    batch: BatchConfig = field(default_factory=BatchConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        cap = self.predict.max_detections
        if self.validation.max_detections > cap:
            raise ValueError(
                f"validation.max_detections = {self.validation.max_detections} is above"
                f" predict.max_detections = {cap}: the network gives no more than that"
            )
        if "max_detections" in self.overrides:
            raise ValueError("overrides.max_detections: set predict.max_detections, which the network follows")
        if not self.build_file:
            preset_config(self.model, **self.overrides)  # says which preset or override it does not know


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0")


def _not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}; it must be 0 or more")
