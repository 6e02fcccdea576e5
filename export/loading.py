"""Which runtime a file needs, and a Predictor that has it."""

import os
from pathlib import Path

import torch

from dsg import model
from dsg.model.network.predictor import Predictor

_EXPORTED = {".onnx": "ONNX", ".ts": "TorchScript", ".pt2": "AOTInductor"}
_PICKLED = (".pt", ".pth", ".pkl", ".bin")


def load(name_or_path: str | os.PathLike[str], device: torch.device | str | None = None) -> Predictor:
    """A Predictor for a name that `dsg models` lists or for a file.

    Args:
        name_or_path: a name, or the path of a checkpoint (.safetensors).
        device: "cpu", "cuda" or "cuda:1"; None takes a GPU if there is one.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: a kind of file that cannot be run, with what to do; a broken checkpoint; a device that is not
            there.
    """
    suffix = Path(name_or_path).suffix.lower()
    if suffix in _EXPORTED:
        raise ValueError(
            f"{os.fspath(name_or_path)}: {_EXPORTED[suffix]} files cannot be run by this version;"
            " give the .safetensors checkpoint they were made from"
        )
    if suffix in _PICKLED:
        raise ValueError(
            f"{os.fspath(name_or_path)} is no checkpoint of dsg; convert it first:"
            f" dsg import-weights {os.fspath(name_or_path)} --from torchvision --model NAME --out FILE.safetensors"
        )
    return model.load(name_or_path, device)
