"""A module in memory as the Predictor's runtime. H, W size of an original picture, h, w of a resized one."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsg.model.network.batch import stack_images
from dsg.model.network.checkpoint import load_checkpoint
from dsg.model.network.constants import constant
from dsg.model.network.detections import Detections
from dsg.model.network.detector import Detector, without_padding
from dsg.model.network.float32 import whole_float32
from dsg.model.network.image_tensor import image_tensor, resize, scaled
from dsg.model.network.info import CheckpointInfo, Resize
from dsg.model.network.norm import fold_norms
from dsg.model.network.predictor import Begun, Precision, PreparedImage, Runtime
from dsg.model.network.replay import Replay
from dsg.model.network.sizes import padded_size, resized_size
from dsg.model.network.types import PaddedDetections
from dsg.ops import kernel_name
from dsg.ops.diagnosis import gpu_problem

_logger = logging.getLogger("dsg.model")
_BYTES_OF_FLOAT = 4


def prepare_tensor(image: Any, how: Resize, on_device: bool = False) -> PreparedImage:
    """What every runtime of torch does with a picture before its batch comes together.

    Args:
        on_device: leave a resize without a low-pass to `detect`, where that is less to bring there: it makes four bytes
            of each, 12 ms of a CPU for a picture of 800x1066.
    """
    pixels = image_tensor(image)
    height, width = pixels.shape[-2:]
    size = resized_size(height, width, how)
    is_less = height * width <= _BYTES_OF_FLOAT * size[0] * size[1]
    is_left = on_device and pixels.dtype == torch.uint8 and not how.antialias and size != (height, width) and is_less
    resized, scale_to = (pixels, size) if is_left else (resize(pixels, how), None)
    return PreparedImage(resized, (height, width), padded_size(*size), scale_to)


class EagerRuntime(Runtime):
    """PyTorch, as the module stands.

    Args:
        model: in eval mode, on its device. Its owner may move or cast it at any time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._replay = Replay()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def description(self) -> str:  # type: ignore[override]
        """Which PyTorch, and which implementation of the ops."""
        return f"PyTorch {torch.__version__} on {self.device}, {kernel_name()}"

    def prepare(self, image: Any, how: Resize) -> PreparedImage:
        return prepare_tensor(image, how, on_device=True)

    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float) -> list[Detections]:
        return self.begin(prepared, score_threshold).finish()

    def begin(self, prepared: Sequence[PreparedImage], score_threshold: float) -> Begun:
        device = self.device  # asked anew: the owner may call model.double() or .cuda()
        # A module of another kind, such as a recipe's own network, takes float pictures alone.
        if isinstance(self.model, Detector) and device.type == "cuda" and prepared and not self.model.training:
            return self._begin_on_gpu(self.model, prepared, score_threshold, device)
        return Begun(lambda: self._detect_here(prepared, score_threshold))

    @torch.inference_mode()
    def _detect_here(self, prepared: Sequence[PreparedImage], score_threshold: float) -> list[Detections]:
        images = self._images(prepared)
        with whole_float32():
            if isinstance(self.model, Detector):
                results = self.model(images, score_threshold=score_threshold)
            else:
                results = self.model(images)
        return [to_original(found, item) for found, item in zip(results, prepared, strict=True)]

    @torch.inference_mode()
    def _begin_on_gpu(
        self, model: Detector, prepared: Sequence[PreparedImage], score_threshold: float, device: torch.device
    ) -> Begun:
        """Have a graph run on a stream of its own, so that what is made of the last batch's results goes on beside."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))  # pictures may be tensors that are still being made
        with torch.cuda.stream(stream), whole_float32():
            batch, sizes = stack_images(self._images(prepared))
            replayed = self._replay.infer(model, batch, sizes)
            # The next batch overwrites them.
            found = None if replayed is None else PaddedDetections(*(tensor.clone() for tensor in replayed))
            done = torch.cuda.Event(blocking=True)  # other threads have the CPU while one waits
            done.record(stream)

        @torch.inference_mode()
        def finish() -> list[Detections]:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for tensor in (batch, sizes, *(found or ())):
                tensor.record_stream(current)
            with whole_float32():
                if found is None:
                    results = model.detect(batch, sizes, score_threshold)
                    self._replay.ran(batch)
                else:
                    results = without_padding(found, sizes, score_threshold)
            return [to_original(one, item) for one, item in zip(results, prepared, strict=True)]

        return Begun(finish, None if found is None else done)

    def _images(self, prepared: Sequence[PreparedImage]) -> list[Tensor]:
        parameter = next(self.model.parameters())
        images = [_brought(item, parameter.device) for item in prepared]
        if not isinstance(self.model, Detector) or any(image.dtype != torch.uint8 for image in images):
            images = [_as_float(image, parameter.dtype) for image in images]
        return images


def _brought(item: PreparedImage, device: torch.device) -> Tensor:
    pixels: Tensor = item.pixels.to(device, non_blocking=True)
    return pixels if item.scale_to is None else scaled(pixels, item.scale_to, antialias=False)


def _as_float(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return pixels.to(dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(dtype)


def to_original(found: Detections, prepared: PreparedImage) -> Detections:
    """Detections of a resized picture in pixels of the original one."""
    height, width = prepared.original_size
    resized_height, resized_width = prepared.size
    # In float32 whatever the dtype: torchvision has its ratios so, and imported networks must give its boxes.
    ratio_x = float(np.float32(width) / np.float32(resized_width))
    ratio_y = float(np.float32(height) / np.float32(resized_height))
    boxes = found.boxes * constant((ratio_x, ratio_y, ratio_x, ratio_y), found.boxes)
    return replace(found, boxes=boxes, image_size=(height, width))


def load_eager(
    path: str | os.PathLike[str], device: torch.device | str | None, precision: Precision, proposals: int | None
) -> tuple[nn.Module, CheckpointInfo]:
    """The module of a checkpoint on its device, and its description; arguments and errors as `predictor.load` says."""
    place = present_device(device)
    model, info = load_checkpoint(path, place)
    if proposals is not None:
        model.selector.proposals = (model.selector.proposals[0], proposals)
    if precision == "auto":
        precision = "float16" if place.type == "cuda" else "float32"
    if precision != "float32":
        fold_norms(model)
        model.to(getattr(torch, precision))
    # Channels-last is what CPUs, tensor cores and SgRoIAlign are fastest with; from the weights it spreads to all else.
    return model.to(memory_format=torch.channels_last), info


@cache
def _say_once(line: str) -> None:
    _logger.warning(line)


def parse_device(device: torch.device | str) -> torch.device:
    """A device as it was named, whether or not it is there. Raises ValueError for any but cpu, cuda and cuda:N."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {chosen} is not supported; use cpu, cuda or cuda:N")
    return chosen


def present_device(device: torch.device | str | None) -> torch.device:
    """A device that is there; None is a GPU if there is one. Raises ValueError."""
    if device is None:
        problem = gpu_problem()
        if problem is not None:
            _say_once(f"{problem}; running on the CPU")
        return torch.device("cuda" if problem is None and torch.cuda.is_available() else "cpu")
    chosen = parse_device(device)
    if chosen.type == "cuda" and (problem := gpu_problem(chosen.index or 0)):
        raise ValueError(problem)
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {chosen} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen
