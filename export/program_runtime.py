"""Runs exported TorchScript and AOTInductor files in PyTorch. Both are code: see `loading.check_trust`.

B images, h and w size of a resized picture, K detections of an image.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsg.ops  # the files call torch.ops.dsg, and hold no kernels
from dsg.export.contract import Contract, ExportError, Format
from dsg.model.network.batch import stack_images
from dsg.model.network.detections import Detections
from dsg.model.network.detector import without_padding
from dsg.model.network.eager import prepare_tensor, present_device, to_original
from dsg.model.network.float32 import whole_float32
from dsg.model.network.info import Resize
from dsg.model.network.predictor import PreparedImage, Runtime
from dsg.model.network.types import PaddedDetections

Program = Callable[[Tensor, Tensor], Sequence[Tensor]]


def load_program(path: Path, contract: Contract, device: torch.device) -> Program:
    """The program in a file, on a device.

    Raises:
        ValueError: compiled for another device.
        ExportError: this PyTorch refuses it.
    """
    if contract.device not in ("any", device.type):
        raise ValueError(f"{path} was compiled for {contract.device} and cannot run on {device}; export it again there")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated upstream; docs/export.md says so
            if contract.format is Format.TORCHSCRIPT:
                return torch.jit.load(path, map_location=device).eval()
            index = -1 if device.index is None else device.index
            return torch._inductor.aoti_load_package(str(path), device_index=index)
    except Exception as error:  # loaders of programs raise nearly anything
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"{path}: PyTorch {torch.__version__} refuses it: {reason}") from None


class ProgramRuntime(Runtime):
    """An exported TorchScript or AOTInductor file as the Predictor's runtime."""

    def __init__(self, path: Path, contract: Contract, device: str | None) -> None:
        if device is None and contract.device != "any":
            device = contract.device
        self.device = present_device(device)
        self._program = load_program(path, contract, self.device)
        kind = "TorchScript" if contract.format is Format.TORCHSCRIPT else "AOTInductor"
        self.description = f"{kind}, PyTorch {torch.__version__} on {self.device}, {dsg.ops.kernel_name()}"

    def prepare(self, image: Any, how: Resize) -> PreparedImage:
        return prepare_tensor(image, how)

    @torch.inference_mode()
    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float) -> list[Detections]:
        pictures = [item.pixels.to(self.device, non_blocking=True) for item in prepared]
        batch, sizes = stack_images([p.float() / 255 if p.dtype == torch.uint8 else p.float() for p in pictures])
        with whole_float32():
            outputs = self._program(batch, sizes)
        padded = PaddedDetections(*outputs)  # its fields are `contract.OUTPUTS`, see `ExportGraph`
        found = without_padding(padded, sizes, score_threshold)
        return [to_original(one, item) for one, item in zip(found, prepared, strict=True)]
