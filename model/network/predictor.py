"""Pictures in any form and size to detections in their own pixels. The command line and the service use this for all.

What runs the network is a `Runtime`: PyTorch for a module (`eager.py`), others for exported files. Importing this
needs no torch.

H, W size of a picture as it came, h, w after the resize.
"""

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from dsg.model.network.detections import Detections, lowest_of
from dsg.model.network.info import CheckpointInfo, Resize

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
_BATCH = 8
Precision = Literal["auto", "float32", "float16", "bfloat16"]
"""What a network computes in; boxes and scores are float32 or wider in any case."""


@dataclass(frozen=True)
class PreparedImage:
    """A picture as the runtime wants it, still on the CPU."""

    pixels: Any  # uint8, or float in 0..1, [3, h, w]: a tensor or a NumPy array; [3, H, W] where yet to be scaled
    original_size: tuple[int, int]
    """(height, width) of the picture that came in."""
    padded_size: tuple[int, int]
    """(height, width) in a batch of its own: pictures that agree here batch without padding for each other."""
    scale_to: tuple[int, int] | None = None
    """(height, width) that `pixels` have yet to be scaled to, where the device does it; None where nothing is to do."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as the network sees it."""
        height, width = self.scale_to or self.pixels.shape[-2:]
        return height, width


class Event(Protocol):
    """Something that a device comes to; torch's events are such."""

    def query(self) -> bool:
        """Whether it has. Raises what the device has failed with."""

    def synchronize(self) -> None:
        """Wait until it has. Raises what the device has failed with."""


@dataclass(frozen=True)
class Begun:
    """A batch on its way."""

    finish: "Callable[[], list[Detections]]"
    """Waits for its end, and gives what `Predictor.detect` gives. Raises what the network raises. Call it once."""
    done: Event | None = None
    """When the device is free for another one; None where `finish` does all the work itself."""


class Runtime(ABC):
    """What runs a network: a module in memory, or an exported file."""

    device: Any
    """Where it runs: a `torch.device`, or for a runtime without torch its name."""

    description: str
    """For the log: which library runs it, on what."""

    @abstractmethod
    def prepare(self, image: Any, how: Resize) -> PreparedImage:
        """Read and resize one picture. On the CPU, safe from any thread."""

    @abstractmethod
    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float) -> list[Detections]:
        """Run one batch; see `Predictor.detect`."""

    def begin(self, prepared: Sequence[PreparedImage], score_threshold: float) -> Begun:
        """Begin one batch, where it can run while this thread does something else; see `Predictor.begin`."""
        return Begun(lambda: self.detect(prepared, score_threshold))


class Predictor:
    """A network with everything that its checkpoint says about how to use it.

    `prepare` may be called from any thread, all else from one at a time.

    Args:
        network: a module in eval mode, on its device, or the runtime of an exported file.
        info: its checkpoint's description.
    """

    def __init__(self, network: "nn.Module | Runtime", info: CheckpointInfo) -> None:
        if not isinstance(network, Runtime):
            from dsg.model.network.eager import EagerRuntime  # torch comes in only where it is used

            network = EagerRuntime(network)
        self.runtime = network
        self.info = info

    @property
    def model(self) -> Any:
        """The module, where there is one in memory; exported files have none (AttributeError)."""
        try:
            return self.runtime.model  # type: ignore[attr-defined]
        except AttributeError:
            raise AttributeError(f"{self.info.name} is an exported file; it has no module in memory") from None

    @property
    def device(self) -> Any:
        """Where the network is."""
        return self.runtime.device

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
        if isinstance(images, str | os.PathLike) or _is_tensor(images) or not isinstance(images, Iterable):
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
        return self.runtime.prepare(image, self.info.resize)

    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float = 0.0) -> list[Detections]:
        """Run one batch: all detections above the network's floor, up to its cap, in each original picture's pixels.

        Pictures of one `padded_size` give what each would give alone; others are padded to the largest.

        Args:
            prepared: from `prepare`.
            score_threshold: 0..1; what scores less may be missing, which saves the time of its mask.
        """
        return self.begin(prepared, score_threshold).finish()

    def begin(self, prepared: Sequence[PreparedImage], score_threshold: float = 0.0) -> Begun:
        """Begin what `detect` does: on a GPU the next batch may begin before this one is finished, in the same thread.

        Raises:
            RuntimeError: no memory for it, or a GPU that fails; `finish` may raise the same.
        """
        begun = self.runtime.begin(prepared, score_threshold)
        return replace(begun, finish=lambda: [replace(found, paste=self.info.paste) for found in begun.finish()])

    def _run_bucket(
        self, bucket: list[tuple[int, PreparedImage]], threshold: float | tuple[float, ...], most: int
    ) -> dict[int, Detections]:
        if not bucket:
            return {}
        results = self.detect([prepared for _, prepared in bucket], lowest_of(threshold))
        return {number: found.select(threshold, most) for (number, _), found in zip(bucket, results, strict=True)}


def _is_tensor(images: Any) -> bool:
    return type(images).__module__.partition(".")[0] == "torch"


def shipped_weights() -> dict[str, Path]:
    """Names of the weights in the package, and where they lie."""
    return {path.stem: path for path in sorted(WEIGHTS_DIR.glob("*.safetensors"))}


def weights_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Where weights of that name lie in the package; for any other text the path that it is."""
    return shipped_weights().get(os.fspath(name_or_path), Path(name_or_path))


def load(
    name_or_path: str | os.PathLike[str],
    device: "torch.device | str | None" = None,
    precision: Precision = "auto",
    proposals: int | None = None,
) -> Predictor:
    """A predictor from weights in the package or from a checkpoint file.

    Args:
        name_or_path: a name of `dsg models`, or a path.
        device: "cuda", "cuda:1", "cpu"; None is a GPU if there is one.
        precision: "float32" is the network as its checkpoint has it. In half precision its frozen norms are part of
            its convolutions, which is for prediction alone. "auto": float16 on a GPU, float32 on a CPU.
        proposals: regions of a picture that its heads look at; None is the checkpoint's own number. Fewer take less
            time, and may miss what is crowded.

    Raises:
        FileNotFoundError: neither a name nor a file.
        CheckpointError: a file that is not a checkpoint, or a broken one.
        ValueError: a device that is not there, an unknown precision, proposals below 1.
    """
    from dsg.model.network.eager import load_eager

    path = weights_path(name_or_path)
    if not path.is_file():
        known = ", ".join(shipped_weights()) or "none"
        raise FileNotFoundError(f"no weights {os.fspath(name_or_path)!r}: neither a file nor one of the names {known}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if proposals is not None and proposals < 1:
        raise ValueError(f"proposals must be at least 1, got {proposals}")
    return Predictor(*load_eager(path, device, precision, proposals))
