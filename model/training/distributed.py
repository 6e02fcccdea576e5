"""Several processes, one GPU each, as torchrun starts them. One process alone needs no process group."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dsg.model.network.eager import parse_device, present_device
from dsg.model.training.errors import TrainingError
from dsg.ops.diagnosis import gpu_problem


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


@contextmanager
def processes(device: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """While open, this process is part of torchrun's group, if there is one; gives its rank and its device.

    Args:
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one. Under torchrun "cuda" becomes the
            GPU of the local rank.

    Raises:
        ValueError: a device that is neither the CPU nor a GPU.
        TrainingError: CUDA is asked for and absent, or a single GPU is named for several processes.
    """
    ranks = Ranks(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )
    chosen = parse_device(device) if device else present_device(None)
    if chosen.type == "cuda":
        problem = gpu_problem(ranks.local_rank if chosen.index is None else chosen.index)
        if problem or not torch.cuda.is_available():
            raise TrainingError(problem or f"device {chosen} was asked for and PyTorch sees no GPU: use device cpu")
        if chosen.index is not None and ranks.world_size > 1:
            raise TrainingError(f"device {chosen} for {ranks.world_size} processes: say cuda, each takes its own GPU")
        if chosen.index is None:
            chosen = torch.device("cuda", ranks.local_rank)
        if chosen.index >= torch.cuda.device_count():
            raise TrainingError(
                f"device {chosen} does not exist: {torch.cuda.device_count()} GPU(s) here; start fewer processes"
            )
        torch.cuda.set_device(chosen)
    if ranks.world_size == 1:
        yield ranks, chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ranks, chosen
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The network as it is called in training: itself, or with its gradients averaged over all processes."""
    if ranks.world_size == 1:
        return model
    # Every head takes part in every step (an empty one with a zero loss), so the graph is not searched each
    # time.
    return DistributedDataParallel(model, find_unused_parameters=False)


def mean_over_ranks(values: torch.Tensor) -> list[float]:
    """Mean of float `values` [n] over all processes, the same numbers on each; one NaN anywhere is NaN
    everywhere."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values.tolist()


def gather_lists(part: list[Any]) -> list[Any]:
    """All processes' lists put together in rank order, on every process."""
    if not dist.is_initialized():
        return part
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [item for one in parts for item in one]


def from_main(value: Any) -> Any:
    """Rank 0's `value`, on every process."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_of(items: Sequence[Any], ranks: Ranks) -> Sequence[Any]:
    """The part of `items` that this process works on: every world_size-th."""
    return items[ranks.rank :: ranks.world_size]
