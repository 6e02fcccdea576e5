"""Whole training steps of our networks beside torchvision's Mask R-CNN on ResNet-50: images a second, stages, memory.

A step is what `dsg train` does: forward with the losses, backward, clipping, one transfer of the numbers, optimiser.
All networks see the same made-up batch, which lies on the device, take the same optimiser, and train the same stages
of their backbones. One network is in memory at a time.
"""

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.v2.functional import to_dtype

from dsg.bench.report import Row, measured_row, size_row
from dsg.bench.timing import Measured, PeakMemory
from dsg.model.data.packed import Batch
from dsg.model.network.build import build
from dsg.model.training.config import OptimizerConfig
from dsg.model.training.loop import precision_of
from dsg.model.training.optim import build_optimizer, clip_gradients, set_learning_rate

MODELS = ("dsg_r50_fpn", "mask_rcnn_r50_fpn")
_CLASSES = 80
_OBJECTS = (7, 20)  # fewest and most of a picture; COCO's have 7 on average
_WARM_UP = 3
_STAGES = {
    "forward": "forward and losses",
    "backward": "backward",
    "update": "clipping, the numbers' way to the host and the optimiser",
}
_BASELINE = "baseline torchvision's Mask R-CNN R-50"
_OPTIMIZER = OptimizerConfig(clip_norm=10.0)
_LEARNING_RATE = 1e-3  # of the optimiser's: every step meets about the same weights
_MEMORY_BATCH = 2


def run(
    device: torch.device,
    models: Sequence[str],
    size: tuple[int, int],
    batch: int,
    repeats: int,
    on_case: Callable[[str], None] = lambda case: None,
) -> list[Row]:
    """Images a second and stage times of each network, and on a GPU its memory, also that of two pictures.

    Args:
        device: CPU or CUDA.
        models: names of presets.
        size: (height, width) of every picture.
        batch: pictures of a step.
        repeats: steps that count, of which the median does, after 3 that do not.
        on_case: told each case before it is measured.
    """
    where = f"{size[0]}x{size[1]}, {str(precision_of(device, 'auto')).removeprefix('torch.')}"
    builders: dict[str, Callable[[], nn.Module]] = {name: partial(build, name, _CLASSES) for name in models}
    builders["torchvision"] = partial(torchvision_mask_rcnn, size)
    measured = {}
    for name, builder in builders.items():
        on_case(f"{name}, batch {batch}")
        measured[name] = measure_steps(builder, device, size, batch, repeats)
    theirs = measured.pop("torchvision")
    rows = []
    for name, ours in measured.items():
        case = f"training {name}, batch {batch} of {where}"
        rows.append(measured_row(f"{case}; {_BASELINE}", ours["step"], theirs["step"], images=batch))
        for stage, words in _STAGES.items():
            rows.append(measured_row(f"{case}, {words}, a step; {_BASELINE}", ours[stage], theirs[stage]))
    if device.type == "cuda":
        peaks = {}
        for name, builder in builders.items():
            on_case(f"{name}, memory of batch {_MEMORY_BATCH}")
            step = measure_steps(builder, device, size, _MEMORY_BATCH, 1)["step"]
            peaks[name] = (step.peak_mib or 0.0) / 1024
        for name in models:
            case = f"training {name}, batch {_MEMORY_BATCH} of {where}, peak memory; {_BASELINE}"
            rows.append(size_row(case, "GiB", peaks[name], peaks["torchvision"]))
    return rows


def torchvision_mask_rcnn(size: tuple[int, int]) -> nn.Module:
    """torchvision's `maskrcnn_resnet50_fpn` with random weights, its norms, its stem and its first stage frozen, as it
    is with weights; pictures of this (height, width) keep their size."""
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    return MaskRCNN(backbone, _CLASSES + 1, min_size=min(size), max_size=max(size))


def made_up_batch(count: int, size: tuple[int, int], device: torch.device) -> Batch:
    """Pictures of noise with ellipses for objects, as a training batch; the same in every run.

    Args:
        count: pictures.
        size: (height, width).
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    images, targets = [], []
    for _ in range(count):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        objects = int(torch.randint(_OBJECTS[0], _OBJECTS[1] + 1, (), generator=generator))
        radii = torch.empty(objects, 2).uniform_(0.02, 0.25, generator=generator) * min(size)  # (y, x)
        extent = torch.tensor([height, width])
        centres = radii + torch.rand(objects, 2, generator=generator) * (extent - 2 * radii)
        y, x = ((axis - centres[:, k, None, None]) / radii[:, k, None, None] for k, axis in enumerate((rows, columns)))
        masks = y**2 + x**2 < 1  # [n, H, W]
        for mask in masks:
            image[:, mask] = torch.randint(0, 256, (3, 1), generator=generator, dtype=torch.uint8)
        target = {
            "boxes": torch.cat((centres - radii, centres + radii), dim=1)[:, [1, 0, 3, 2]],  # [n, 4] xyxy
            "labels": torch.randint(1, _CLASSES + 1, (objects,), generator=generator),
            "masks": masks.to(torch.uint8),
        }
        images.append(image.to(device))
        targets.append({name: value.to(device) for name, value in target.items()})
    return images, targets


def measure_steps(
    builder: Callable[[], nn.Module], device: torch.device, size: tuple[int, int], batch: int, repeats: int
) -> dict[str, Measured]:
    """Times of "step", with the memory of all, weights included, and of its stages "forward", "backward" and "update".

    Args:
        builder: makes a network in training mode that gives losses by name for images and targets.
        device, size, batch, repeats: as in `run`.
    """
    gc.collect()  # the network before may be held by cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    memory = PeakMemory(device)
    torch.manual_seed(0)
    trained = _Trained(builder(), made_up_batch(batch, size, device), device)
    times: dict[str, list[float]] = defaultdict(list)
    for repeat in range(_WARM_UP + repeats):
        milliseconds = trained.step()
        if repeat < _WARM_UP:
            continue
        for stage, one in zip(_STAGES, milliseconds, strict=True):
            times[stage].append(one)
        times["step"].append(sum(milliseconds))
    return {stage: Measured(found, memory.mib() if stage == "step" else None) for stage, found in times.items()}


@dataclass
class _Trained:
    """A network with its optimiser, on a batch that never changes."""

    network: nn.Module
    batch: Batch
    device: torch.device

    def __post_init__(self) -> None:
        self.network.to(self.device)
        if self.device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)
        self.network.train()
        self._precision = precision_of(self.device, "auto")
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._precision == torch.float16)
        self._optimizer = build_optimizer(self.network, _OPTIMIZER, len(self.batch[0]))
        set_learning_rate(self._optimizer, _LEARNING_RATE)

    def step(self) -> list[float]:
        """One step; milliseconds of its stages."""
        images, targets = self.batch
        marks = [self._mark()]
        floats = [to_dtype(image, torch.float32, scale=True) for image in images]
        with torch.autocast(self.device.type, self._precision, enabled=self._precision != torch.float32):
            losses: dict[str, Tensor] = self.network(floats, [dict(target) for target in targets])
        values = torch.stack([loss.float() for loss in losses.values()])
        marks.append(self._mark())
        self._scaler.scale(values.sum()).backward()
        marks.append(self._mark())
        self._scaler.unscale_(self._optimizer)
        norm = clip_gradients(self.network, _OPTIMIZER.clip_norm)
        if not all(math.isfinite(value) for value in torch.cat((values.detach(), norm.float()[None])).tolist()):
            raise ValueError("the made-up batch led to losses that are not numbers: nothing was measured")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        return self._between(marks)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: list[Any]) -> list[float]:
        pairs = pairwise(marks)
        if self.device.type != "cuda":
            return [(end - begin) * 1000 for begin, end in pairs]
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]
