"""Pictures in any form and size to detections in their own pixels. The command line and the service use this for all.

h, w size of a resized picture; H, W of the original one.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsg.model.network.batch import padded_size
from dsg.model.network.checkpoint import CheckpointInfo, Resize, load_checkpoint
from dsg.model.network.detections import Detections, lowest_of
from dsg.model.network.detector import Detector
from dsg.model.network.pixels import image_tensor

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
_BATCH = 8


@dataclass(frozen=True)
class PreparedImage:
    """A picture as the network wants it, still on the CPU."""

    pixels: Tensor  # uint8, or float in 0..1, [3, h, w]
    original_size: tuple[int, int]
    """(height, width) of the picture that came in."""
    padded_size: tuple[int, int]
    """(height, width) in a batch of its own: pictures that agree here batch without padding for each other."""


class Predictor:
    """A network with everything that its checkpoint says about how to use it.

    `prepare` may be called from any thread, `detect` and `predict` from one at a time.

    Args:
        model: the network, in eval mode, on `device`.
        info: its checkpoint's description.
    """

    def __init__(self, model: Detector, info: CheckpointInfo) -> None:
        self.model = model
        self.info = info

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def predict(
        self,
        images: Any,
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """Detections of each picture.

        Args:
            images: an iterable of paths, PIL pictures, uint8 arrays [H, W, 3] RGB, or tensors [3, H, W] (uint8, or
                float in 0..1), in any mix of sizes.
            score_threshold: 0..1 for all classes; None is the checkpoint's own, which may be one of each class.
            max_detections: 1 up to the checkpoint's cap; None is the cap.

        Returns:
            a `Detections` a picture, boxes in the picture's own pixels.

        Raises:
            TypeError, ValueError, FileNotFoundError: what is wrong with which picture or argument.
        """
        threshold, most = self.limits(score_threshold, max_detections)
        if isinstance(images, str | os.PathLike | Tensor) or not isinstance(images, Iterable):
            raise TypeError(f"predict takes a list of pictures, got {type(images).__name__}; put it in [ ]")
        buckets: dict[tuple[int, int], list[tuple[int, PreparedImage]]] = defaultdict(list)
        found: dict[int, Detections] = {}
        for number, image in enumerate(images):
            prepared = self.prepare(image)
            bucket = buckets[prepared.padded_size]
            bucket.append((number, prepared))
            if len(bucket) == _BATCH:
                found |= self._run_bucket(bucket, threshold, most)
                bucket.clear()
        for bucket in buckets.values():
            found |= self._run_bucket(bucket, threshold, most)
        return [found[number] for number in sorted(found)]

    def limits(
        self, score_threshold: float | None, max_detections: int | None
    ) -> tuple[float | tuple[float, ...], int]:
        """What is asked for, or the checkpoint's own, as `Detections.select` takes it.

        Raises:
            TypeError, ValueError: what is asked for is no number, or out of range.
        """
        if score_threshold is not None:
            if isinstance(score_threshold, bool) or not isinstance(score_threshold, int | float):
                raise TypeError(f"score_threshold must be a number in 0..1, got {score_threshold!r}")
            if not 0.0 <= score_threshold <= 1.0:
                raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}")
        threshold = self.info.default_threshold if score_threshold is None else score_threshold
        most = self.info.max_detections if max_detections is None else max_detections
        if isinstance(most, bool) or not isinstance(most, int):
            raise TypeError(f"max_detections must be a whole number, got {most!r}")
        if not 1 <= most <= self.info.max_detections:
            raise ValueError(
                f"max_detections must be in 1..{self.info.max_detections} for {self.info.name}, got {most}"
            )
        return threshold, most

    def prepare(self, image: Any) -> PreparedImage:
        """Read and resize one picture, in any form that `predict` takes. On the CPU, safe from any thread."""
        pixels = image_tensor(image)
        height, width = pixels.shape[-2:]
        resized = resize(pixels, self.info.resize)
        return PreparedImage(resized, (height, width), padded_size(*resized.shape[-2:]))

    @torch.inference_mode()
    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float = 0.0) -> list[Detections]:
        """Run one batch: all detections above the network's floor, up to its cap, in each original picture's pixels.

        Pictures of one `padded_size` give what each would give alone; others are padded to the largest.

        Args:
            prepared: from `prepare`.
            score_threshold: 0..1; what scores less may be missing, which saves the time of its mask.
        """
        images = [self._on_device(item.pixels) for item in prepared]
        # A module of another kind, such as a recipe's own network, takes pictures alone.
        options = {"score_threshold": score_threshold} if isinstance(self.model, Detector) else {}
        results = self.model(images, **options)
        return [_to_original(found, item) for found, item in zip(results, prepared, strict=True)]

    def _run_bucket(
        self, bucket: list[tuple[int, PreparedImage]], threshold: float | tuple[float, ...], most: int
    ) -> dict[int, Detections]:
        if not bucket:
            return {}
        results = self.detect([prepared for _, prepared in bucket], lowest_of(threshold))
        return {number: found.select(threshold, most) for (number, _), found in zip(bucket, results, strict=True)}

    def _on_device(self, pixels: Tensor) -> Tensor:
        parameter = next(self.model.parameters())  # asked anew: the owner may call model.double() or .cuda()
        moved = pixels.to(parameter.device, non_blocking=True)
        return moved.to(parameter.dtype) / 255 if moved.dtype == torch.uint8 else moved.to(parameter.dtype)


def resized_size(height: int, width: int, how: Resize) -> tuple[int, int]:
    """(height, width) after the resize: fractions of a pixel are cut off, at least one pixel stays."""
    scale = min(how.short_side / min(height, width), how.long_side / max(height, width))
    return max(int(height * scale), 1), max(int(width * scale), 1)


def resize(pixels: Tensor, how: Resize) -> Tensor:
    """Scale a picture, keeping its shape.

    Args:
        pixels: Tensor[3, H, W], uint8 or float in 0..1.

    Returns:
        Tensor[3, h, w]: uint8 when that came in and the resize has a low-pass, else float in 0..1. Without the
        low-pass numbers are kept unrounded, as the libraries whose convention that is have it.
    """
    height, width = pixels.shape[-2:]
    size = resized_size(height, width, how)
    if pixels.dtype == torch.uint8 and not how.antialias:
        pixels = pixels.float() / 255
    if size == (height, width):
        return pixels.contiguous()
    scaled = functional.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=how.antialias)
    return scaled[0]


def _to_original(found: Detections, prepared: PreparedImage) -> Detections:
    height, width = prepared.original_size
    resized_height, resized_width = prepared.pixels.shape[-2:]
    # In float32 whatever the dtype: torchvision has its ratios so, and imported networks must give its boxes.
    ratio_x, ratio_y = torch.tensor([width, height]).float() / torch.tensor([resized_width, resized_height]).float()
    boxes = found.boxes * torch.stack([ratio_x, ratio_y, ratio_x, ratio_y]).to(found.boxes)
    return replace(found, boxes=boxes, image_size=(height, width))


def shipped_weights() -> dict[str, Path]:
    """Names of the weights in the package, and where they lie."""
    return {path.stem: path for path in sorted(WEIGHTS_DIR.glob("*.safetensors"))}


def weights_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Where weights of that name lie in the package; for any other text the path that it is."""
    return shipped_weights().get(os.fspath(name_or_path), Path(name_or_path))


def load(name_or_path: str | os.PathLike[str], device: torch.device | str | None = None) -> Predictor:
    """A predictor from weights in the package or from a checkpoint file.

    Args:
        name_or_path: a name of `dsg models`, or a path.
        device: "cuda", "cuda:1", "cpu"; None is a GPU if there is one.

    Raises:
        FileNotFoundError: neither a name nor a file.
        CheckpointError: a file that is not a checkpoint, or a broken one.
        ValueError: a device that is not there.
    """
    path = weights_path(name_or_path)
    if not path.is_file():
        known = ", ".join(shipped_weights()) or "none"
        raise FileNotFoundError(f"no weights {os.fspath(name_or_path)!r}: neither a file nor one of the names {known}")
    model, info = load_checkpoint(path, _device(device))
    # Channels-last is what CPUs, tensor cores and SgRoIAlign are fastest with; from the weights it spreads to all else.
    return Predictor(model.to(memory_format=torch.channels_last), info)


def parse_device(device: torch.device | str) -> torch.device:
    """A device as it was named, whether or not it is there. Raises ValueError for any but cpu, cuda and cuda:N."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {chosen} is not supported; use cpu, cuda or cuda:N")
    return chosen


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = parse_device(device)
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {chosen} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen
