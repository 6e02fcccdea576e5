"""Checkpoints: tensors as safetensors, and beside them all that decides the predictions.

The file's metadata holds one JSON document under the key `dsg`: a `CheckpointInfo`. Nothing in a checkpoint is code.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsg.model.network.atomic import replacing
from dsg.model.network.build import build_from_config
from dsg.model.network.detector import Detector
from dsg.model.network.presets import preset_config

_KEY = "dsg"
JUST_ABOVE_ONE = 1.0 + 2.0**-23
"""The float32 after 1: a threshold that no score reaches."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project, or a broken one; one line that names it."""


@dataclass(frozen=True)
class Category:
    """One class, as the file it was trained on names it."""

    id: int
    """Category id of every output; never the label's index."""
    name: str
    supercategory: str = ""


@dataclass(frozen=True)
class Resize:
    """How pictures are scaled before the network sees them: keeping their shape, until a bound is met."""

    short_side: int
    """Pixels that the short side is scaled to ..."""
    long_side: int
    """... unless the long side would then exceed this many pixels."""
    interpolation: str = "bilinear"
    antialias: bool = True
    """Low-pass before shrinking; torchvision's detectors do not."""

    def __post_init__(self) -> None:
        if self.interpolation != "bilinear":
            raise ValueError(f"resize interpolation must be 'bilinear', got {self.interpolation!r}")
        if not 0 < self.short_side <= self.long_side:
            raise ValueError(f"resize needs 0 < short_side <= long_side, got {self.short_side} and {self.long_side}")


@dataclass(frozen=True)
class CheckpointInfo:
    """All that decides a checkpoint's predictions beside its tensors, and where it comes from."""

    name: str
    preset: str
    overrides: dict[str, Any]
    """Fields of `DetectorConfig` that differ from the preset, `num_classes` excepted (it is len(categories))."""
    categories: tuple[Category, ...]
    """Label l is categories[l - 1]."""
    resize: Resize
    score_threshold: float
    """Default of `predict` and `/segment` for all classes where `class_thresholds` is empty, 0..1."""
    eval_score_threshold: float = 0.001
    """What evaluation uses (paper, section 4.1), 0..1."""
    max_detections: int = 100
    """Default and cap of detections a picture."""
    class_thresholds: tuple[float, ...] = ()
    """Default of `predict` and `/segment` for labels 1, 2, ...: 0..1, or just above 1 for a class that is not shown
    unless asked for. Empty: `score_threshold` for all."""
    class_precision: float = 0.0
    """Share of right detections that `class_thresholds` were chosen for, 0..1; 0 where nothing was chosen."""
    licence: str = ""
    """Of the weights, with what their training data demands."""
    version: str = ""
    """Of the package that wrote the file."""
    hash: str = ""
    """SHA-256 over names, types, shapes and bytes of the tensors."""
    notes: dict[str, str] = field(default_factory=dict)
    """Free text: data, recipe, iterations, AP."""

    def __post_init__(self) -> None:
        if self.class_thresholds and len(self.class_thresholds) != len(self.categories):
            raise ValueError(
                f"class_thresholds must be one for each of {len(self.categories)} categories,"
                f" got {len(self.class_thresholds)}"
            )
        for value in self.class_thresholds:
            if not _is_between(value, JUST_ABOVE_ONE):
                raise ValueError(f"class_thresholds must be numbers in 0..1, got {value!r}")
        if not _is_between(self.class_precision, 1.0):
            raise ValueError(f"class_precision must be a number in 0..1, got {self.class_precision!r}")

    @property
    def default_threshold(self) -> float | tuple[float, ...]:
        """Lowest score that is shown where nothing else is asked for: one for all classes, or one of each label."""
        return self.class_thresholds or self.score_threshold

    @property
    def threshold_in_words(self) -> str:
        """The default threshold for people, such as "0.4" or "0.31 to 0.72 by class (chosen for 80% right ones)"."""
        if not self.class_thresholds:
            return f"{self.score_threshold:g}"
        lowest, highest = min(self.class_thresholds), max(self.class_thresholds)
        return f"{lowest:.2f} to {highest:.2f} by class (chosen for {self.class_precision:.0%} right ones)"

    @property
    def category_ids(self) -> list[int]:
        """Category id of labels 1, 2, ..."""
        return [category.id for category in self.categories]

    @property
    def category_names(self) -> list[str]:
        """Name of labels 1, 2, ..."""
        return [category.name for category in self.categories]

    def to_json(self) -> str:
        """One line of JSON, keys in the order of the fields."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointInfo":
        """What `to_json` wrote. Raises KeyError, TypeError or ValueError when it is something else."""
        document = json.loads(text)
        document["categories"] = tuple(Category(**category) for category in document["categories"])
        document["resize"] = Resize(**document["resize"])
        document["class_thresholds"] = tuple(document.get("class_thresholds", ()))  # older files have none
        return cls(**document)


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, info: CheckpointInfo, half: bool = False
) -> CheckpointInfo:
    """Write a checkpoint in one step: a reader sees the old file or the new one, never half of one.

    Args:
        path: file to write; its folder is made if it is not there.
        model: what `build(info.preset, len(info.categories), **info.overrides)` gives.
        half: store floating tensors in float16, except norm statistics, whose range float16 cannot hold.

    Returns:
        info with `hash` and `version` filled in.

    Raises:
        ValueError: the model's tensors are not those of the preset with its overrides.
        OSError: the file cannot be written.
    """
    with torch.device("meta"):
        expected = build_from_config(preset_config(info.preset, len(info.categories), **info.overrides))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_names(str(path), expected.state_dict(), tensors)
    if half:
        tensors = {name: _to_half(name, tensor) for name, tensor in tensors.items()}
    info = replace(info, hash=hash_tensors(tensors), version=version("dsg"))
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={_KEY: info.to_json()})
    return info


def read_info(path: str | os.PathLike[str]) -> CheckpointInfo:
    """The checkpoint's description, without its tensors.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or a broken one: {error}") from None
    if "own_network" in metadata:
        raise CheckpointError(f"{path} holds a network of a recipe's own code; load its tensors with that code")
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but no checkpoint of dsg; import it with dsg import-weights"
        )
    try:
        return CheckpointInfo.from_json(metadata[_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its description cannot be read ({error}); was it written by another version?"
        ) from None


def rewrite_info(path: str | os.PathLike[str], info: CheckpointInfo) -> None:
    """Give a checkpoint another description of the same tensors, in one step; other metadata of the file stays.

    Args:
        path: a checkpoint; where it is a link, what it points to is rewritten.
        info: with the hash that `read_info` gave.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, or its tensors are not those that `info.hash` says.
        OSError: the file cannot be written; it stays as it was.
    """
    path = Path(path).resolve()
    read_info(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if hash_tensors(tensors) != info.hash:
        raise CheckpointError(f"{path}: its tensors do not have the hash that its description says; get the file again")
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, _KEY: info.to_json()})


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[Detector, CheckpointInfo]:
    """The network in eval mode, float32, on the device (default CPU), and its description.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, tampered with, or its tensors do not fit its preset.
    """
    info = read_info(path)
    try:
        config = preset_config(info.preset, len(info.categories), **info.overrides)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if hash_tensors(tensors) != info.hash:
        raise CheckpointError(f"{path}: its tensors do not have the hash that its description says; get the file again")
    model = build_from_config(config)
    wanted = model.state_dict()
    _check_names(str(path), wanted, tensors)
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})
    return model.eval().to(device or "cpu"), info


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_between(value: object, highest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= highest


def _to_half(name: str, tensor: Tensor) -> Tensor:
    is_statistic = name.endswith(("running_mean", "running_var"))
    return tensor.half() if tensor.is_floating_point() and not is_statistic else tensor


def _check_names(where: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Same names, same shapes, or one line that says the first difference."""
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: tensor {name} is {tuple(found[name].shape)}, the preset wants {tuple(tensor.shape)}"
            )
    extra = sorted(set(found) - set(expected))
    if extra:
        raise CheckpointError(
            f"{where}: the preset has no tensor {extra[0]}" + (f" (and {len(extra) - 1} more)" if extra[1:] else "")
        )
