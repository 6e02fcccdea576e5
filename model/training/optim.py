"""Optimiser and learning-rate schedule.

The rate of every iteration is a function of its number alone, so a resumed run needs no scheduler state.
"""

import bisect
import math
from dataclasses import dataclass

import torch
from torch import nn

from dsg.model.training.config import OptimizerConfig, ScheduleConfig
from dsg.model.training.initial import backbone_of

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, config: OptimizerConfig, batch_images: int) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that train.

    Parameters fall into groups by two questions: in the backbone or not; and weight, bias, or a norm's scale
    or shift. Each group keeps its full rate as ``base_lr`` for `set_learning_rate`.

    Args:
        model: the network; parameters that need no gradient are left out.
        config: rates and decays.
        batch_images: images of one optimiser step, over all devices; scales the rate if
            `config.lr_for_batch` is set.
    """
    rate = config.lr * (batch_images / config.lr_for_batch if config.lr_for_batch else 1.0)
    norm_parameters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    backbone = backbone_of(model)
    backbone_parameters = {id(parameter) for parameter in backbone.parameters()} if backbone else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr, decay = rate, config.weight_decay
        if id(parameter) in backbone_parameters:
            lr *= config.backbone_lr_factor
        if id(parameter) in norm_parameters:
            decay = config.norm_weight_decay
        elif name.endswith("bias"):
            lr, decay = lr * config.bias_lr_factor, config.bias_weight_decay
        groups.setdefault((lr, decay), []).append(parameter)
    if not groups:
        raise ValueError("the network has no parameter that trains: check what it freezes")
    parameters = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()
    ]
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum)
    on_gpu = all(parameter.is_cuda for members in groups.values() for parameter in members)
    return torch.optim.AdamW(parameters, lr=rate, fused=on_gpu)


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor over a run, all lengths in optimiser steps."""

    iterations: int
    """Optimiser steps of the whole run."""
    milestones: tuple[int, ...]
    """Steps from which the rate is multiplied by `gamma` once more; empty with cosine."""
    gamma: float
    """Factor at each milestone."""
    cosine: bool
    """Half a cosine from 1 down to `final_factor` in place of milestones."""
    final_factor: float
    """Where the cosine ends, as a share of the full rate."""
    warmup_iterations: int
    """Steps over which the rate rises linearly."""
    warmup_factor: float
    """Share of the rate at step 0."""

    @classmethod
    def of(cls, config: ScheduleConfig, epoch_iterations: int) -> "Schedule":
        """The schedule in steps, `epoch_iterations` of them an epoch where the recipe counts in epochs."""
        unit = epoch_iterations if config.epochs else 1
        length = config.epochs or config.iterations
        return cls(
            iterations=length * unit,
            milestones=tuple(step * unit for step in config.steps),
            gamma=config.gamma,
            cosine=config.decay == "cosine",
            final_factor=config.final_factor,
            warmup_iterations=config.warmup_iterations,
            warmup_factor=config.warmup_factor,
        )

    def factor(self, iteration: int) -> float:
        """Share of the full rate that step `iteration` (0-based) uses."""
        if self.cosine:
            done = min(1.0, iteration / self.iterations)
            factor = self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * done))
        else:
            factor = self.gamma ** bisect.bisect_right(self.milestones, iteration)
        if iteration < self.warmup_iterations:
            risen = iteration / self.warmup_iterations
            factor *= self.warmup_factor * (1 - risen) + risen
        return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Gives every group `factor` times its full rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scales the gradients down to an L2 norm of `max_norm` over all parameters (0: leaves them).

    Returns:
        Tensor[] float: the norm before, for the log.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
