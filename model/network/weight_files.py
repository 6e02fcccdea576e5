"""State dicts that other programs wrote, read without running anything in them."""

import os
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a .safetensors file or from what `torch.save(module.state_dict())` wrote.

    Raises:
        ValueError: no such file, not a file of tensors, or a pickle of anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own words advise to load such files as code; nobody should
        raise ValueError(f"{path} is not a weight file, or a broken one: no plain tensors in it") from None
    except Exception as error:  # an unpickler raises nearly anything when it is fed another kind of file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a weight file, or a broken one: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no plain state dict: save module.state_dict() alone")
    return tensors
