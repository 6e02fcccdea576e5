"""State dicts that other programs wrote, read without running anything in them."""

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsg.model.network.inert_pickle import InertPickleError, read_inert


@dataclass(frozen=True)
class ForeignWeights:
    """What a training program of other people saved."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    """What the file says of itself, where it does: mmdetection's `CLASSES`, `config`, ..."""


def read_foreign(path: str | os.PathLike[str]) -> ForeignWeights:
    """Tensors by name from .safetensors, from what `torch.save` wrote, or from detectron2's .pkl.

    A state dict may lie in a larger dict under `state_dict` or `model`, beside an optimizer's state for instance; names
    may begin with `module.`, as a distributed wrapper adds it. Values that are no tensors are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without tensors, a broken one, or one that holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    content = _pickled(path) if path.suffix == ".pkl" else _saved(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, no state dict")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))  # a copy: the bytes are read-only
        if isinstance(value, Tensor) and isinstance(name, str):
            tensors[name.removeprefix("module.")] = value
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name: give a file of weights")
    return ForeignWeights(tensors, meta if isinstance(meta, dict) else {})


def _pickled(path: Path) -> Any:
    try:
        return read_inert(path.read_bytes())
    except InertPickleError as error:
        raise ValueError(f"{path} is no file of weights, or a broken one: {error}") from None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a .safetensors file or from what `torch.save(module.state_dict())` wrote.

    Raises:
        ValueError: no such file, not a file of tensors, or a pickle of anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file {path}")
    tensors = _saved(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no plain state dict: save module.state_dict() alone")
    return tensors


def _saved(path: Path) -> Any:
    """What is in a .safetensors file, or in one of `torch.save`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own words advise to load such files as code; nobody should
        raise ValueError(f"{path} is not a weight file, or a broken one: no plain tensors in it") from None
    except Exception as error:  # an unpickler raises nearly anything when it is fed another kind of file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a weight file, or a broken one: {reason}") from None
