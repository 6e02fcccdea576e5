"""Which runtime a file needs, and a Predictor that has it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dsg.export.container import read_contract
from dsg.export.contract import Contract, ExportError, Format
from dsg.model.network import predictor
from dsg.model.network.predictor import Precision, Predictor, Runtime

if TYPE_CHECKING:
    import torch

_PICKLED = (".pt", ".pth", ".pkl", ".bin")
_EXPORTED = {kind.suffix for kind in Format}


def load(
    name_or_path: str | os.PathLike[str],
    device: "torch.device | str | None" = None,
    precision: Precision = "auto",
    proposals: int | None = None,
) -> Predictor:
    """A Predictor for a name that `dsg models` lists or for a file.

    Args:
        name_or_path: a name, or the path of a checkpoint (.safetensors) or of what `dsg export` wrote (.onnx; .ts and
            .pt2, which are code, where the environment variable DSG_TRUST_CODE is 1).
        device: "cpu", "cuda" or "cuda:1"; None takes a GPU if there is one.
        precision, proposals: of a checkpoint, as `dsg.model.load` takes them; an exported file has its own.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: a file that cannot be run, or a broken one, with what to do; a device that is not there.
    """
    suffix = Path(name_or_path).suffix.lower()
    if suffix in _EXPORTED:
        if precision != "auto" or proposals is not None:
            raise ValueError(f"{os.fspath(name_or_path)} is an exported file: its precision and proposals are its own")
        return load_exported(Path(name_or_path), None if device is None else str(device))
    if suffix in _PICKLED:
        raise ValueError(
            f"{os.fspath(name_or_path)} is no checkpoint of dsg; convert it first:"
            f" dsg import-weights {os.fspath(name_or_path)} --from torchvision --model NAME --out FILE.safetensors"
        )
    return predictor.load(name_or_path, device, precision, proposals)


def load_exported(path: Path, device: str | None) -> Predictor:
    """A Predictor for what `dsg export` wrote; errors as `load` says."""
    contract = read_contract(path)
    check_trust(path, contract)
    return Predictor(_runtime(path, contract, device), contract.checkpoint)


def check_trust(path: Path, contract: Contract) -> None:
    """Raise ExportError for a file of code where the user has not said that such files may run."""
    if contract.format.is_code and os.environ.get("DSG_TRUST_CODE") != "1":
        raise ExportError(
            f"{path} is a program that would run with all your rights; if you trust who made it, set DSG_TRUST_CODE=1"
            " (its checksum is right, but a checksum is no signature)"
        )


def _runtime(path: Path, contract: Contract, device: str | None) -> Runtime:
    if contract.format is Format.ONNX:
        from dsg.export.onnx_runtime import OnnxRuntime

        return OnnxRuntime(path, device)
    from dsg.export.program_runtime import ProgramRuntime

    return ProgramRuntime(path, contract, device)
