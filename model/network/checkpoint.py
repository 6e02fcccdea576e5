"""Checkpoints: tensors as safetensors, and beside them all that decides the predictions.

The file's metadata holds one JSON document under the key `dsg`: a `CheckpointInfo`. Nothing in a checkpoint is code.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsg.model.network.atomic import replacing
from dsg.model.network.build import build_from_config
from dsg.model.network.detector import Detector
from dsg.model.network.info import JUST_ABOVE_ONE, Category, CheckpointInfo, Resize
from dsg.model.network.presets import preset_config

__all__ = [
    "JUST_ABOVE_ONE",
    "Category",
    "CheckpointError",
    "CheckpointInfo",
    "Resize",
    "hash_tensors",
    "load_checkpoint",
    "read_info",
    "rewrite_info",
    "save_checkpoint",
]

_KEY = "dsg"


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project, or a broken one; one line that names it."""


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
