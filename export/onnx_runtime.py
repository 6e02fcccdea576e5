"""Runs an exported ONNX file by onnxruntime, with NumPy around it and no torch.

B images, h and w size of a resized picture, K detections of an image, m side of a mask.
"""

import logging
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from dsg.export.contract import OUTPUTS, ExportError
from dsg.export.op_library import OP_LIBRARY
from dsg.export.padded import detections_of, stack_arrays
from dsg.model.network.array_resize import resize_array
from dsg.model.network.detections import Detections
from dsg.model.network.info import Resize
from dsg.model.network.pixels import picture_array
from dsg.model.network.predictor import PreparedImage, Runtime
from dsg.model.network.sizes import padded_size

logger = logging.getLogger("dsg.export")

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


class OnnxNetwork:
    """A session: arrays in, arrays out.

    Args:
        path: the file, already checked.
        device: "cpu", "cuda", "cuda:1"; None is a GPU where onnxruntime has one.
        with_library: run the op by the native library where that is there.
        profile: prefix of a profile to write, None for none.

    Raises:
        ValueError: a device that is not there.
        ExportError: a file that onnxruntime refuses.
    """

    def __init__(
        self,
        path: Path,
        device: str | None,
        with_library: bool = True,
        profile: str | None = None,
    ) -> None:
        self.device, providers = _providers(device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings are about how it places nodes, and help no user
        self.has_library = with_library and os.environ.get("DSG_OPS") != "reference" and _register(options)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
        except Exception as error:  # its own classes derive from nothing narrower
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(f"{path}: onnxruntime {onnxruntime.__version__} refuses it: {reason}") from None
        if self.device != "cpu" and _CUDA not in self.session.get_providers():
            raise ValueError(
                f"device {self.device} is not there: onnxruntime could not start CUDA; see its own message"
            )

    def __call__(self, images: NDArray[np.float32], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """images [B, 3, H, W], sizes [B, 2] -> the arrays of `contract.OUTPUTS`."""
        results = self.session.run(list(OUTPUTS), {"images": images, "sizes": sizes})
        return dict(zip(OUTPUTS, results, strict=True))


class OnnxRuntime(Runtime):
    """An exported ONNX file as the Predictor's runtime.

    What it gives holds torch tensors where torch is installed, as from every other runtime, and else NumPy arrays.
    """

    def __init__(self, path: Path, device: str | None) -> None:
        self.network = OnnxNetwork(path, device)
        self.device = self.network.device
        ops = "native kernels of the op" if self.network.has_library else "the op by its body"
        self.description = f"onnxruntime {onnxruntime.__version__} on {self.device}, {ops}"
        self._gives_tensors = find_spec("torch") is not None

    def prepare(self, image: Any, how: Resize) -> PreparedImage:
        pixels = (
            _tensor_pixels(image) if type(image).__module__.partition(".")[0] == "torch" else picture_array(image)
        )  # [H, W, 3]
        resized = resize_array(pixels, how).transpose(2, 0, 1)  # [3, h, w]
        return PreparedImage(resized, pixels.shape[:2], padded_size(*resized.shape[-2:]))

    def detect(self, prepared: Sequence[PreparedImage], score_threshold: float) -> list[Detections]:
        images, sizes = stack_arrays([item.pixels for item in prepared])
        found = detections_of(self.network(images, sizes), prepared, score_threshold)
        return [one.to("cpu") for one in found] if self._gives_tensors else found


def _tensor_pixels(image: Any) -> NDArray[Any]:
    """A tensor [3, H, W] that the caller gave, as pixels [H, W, 3], uint8 or float32."""
    from dsg.model.network.image_tensor import image_tensor

    pixels = image_tensor(image).permute(1, 2, 0).numpy()
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)


def _providers(device: str | None) -> tuple[str, list[Any]]:
    """The device's name, and what onnxruntime is to use for it."""
    device = None if device is None else str(device)
    if device is not None and re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if device is None:
        device = "cuda" if has_cuda and _has_gpu() else "cpu"
    if device == "cpu":
        return device, [_CPU]
    if not has_cuda:
        raise ValueError(
            f"device {device} is not there: this onnxruntime has no CUDA; install it with: pip install 'dsg[onnx-gpu]'"
        )
    onnxruntime.preload_dlls()  # CUDA's libraries from the wheels of NVIDIA or torch, where they lie in no system path
    number = int(device.partition(":")[2] or 0)
    options = {
        "device_id": number,
        "use_tf32": 0,  # float32 in float32, see dsg.model.network.float32
        # By default each convolution of each new shape is tried in all ways that there are, which takes minutes where
        # pictures have many sizes.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return device, [(_CUDA, options), _CPU]


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()


def _register(options: "onnxruntime.SessionOptions") -> bool:
    """Load the op's kernels; a library that does not load costs a warning: the op's body takes over."""
    if not OP_LIBRARY.is_file():
        return False
    try:
        options.register_custom_ops_library(os.fspath(OP_LIBRARY))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        logger.warning("%s does not load (%s); the op's body runs instead", OP_LIBRARY, first_line)
        return False
    return True
