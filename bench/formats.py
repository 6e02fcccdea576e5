"""One network as it runs eager, compiled, and from each of its exported files, side by side.

Measured is the graph alone, on batches that already lie on the device: no decoding, no pasting. B images, H and W
their padded size.
"""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsg.bench.report import Row, measured_row
from dsg.bench.timing import Measured, measure
from dsg.export.container import read_contract
from dsg.export.contract import ExportError, Format
from dsg.export.onnx_runtime import OnnxNetwork
from dsg.export.program_runtime import load_program
from dsg.export.writing import export
from dsg.model.network import predictor
from dsg.model.network.float32 import whole_float32
from dsg.model.network.sizes import padded_size, resized_size

_PHOTO = (480, 640)  # (height, width), before the resize that the model asks for
Run = Callable[[Tensor, Tensor], object]


class Way(StrEnum):
    """How a network can be run."""

    EAGER = "eager"
    COMPILED = "compiled"
    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"
    ONNX_BODY = "onnx-body"
    """Without the native kernels of the op."""
    AOTI = "aoti"


def run(
    model: str,
    device: torch.device,
    ways: list[Way],
    batches: list[int],
    repeats: int,
    half: bool = False,
    prove: bool = True,
    on_case: Callable[[str], None] = lambda case: None,
) -> list[Row]:
    """Pictures a second of each way at each batch size, with spread and memory; the ratio is to eager at the same one.

    Args:
        model: a name of `dsg models`, or a checkpoint; what is measured is exported from it first.
        device: CPU or CUDA.
        ways: what to measure, eager apart, which always is.
        batches: numbers of pictures in a batch.
        repeats: measurements of each, of which the median counts.
        half: everything in float16.
        prove: False measures files as they were written, also where they find other things.
        on_case: told each case before it is measured, each export, and each way that is left out since its file is
            none or differs from the model.
    """
    loaded = predictor.load(model, device, "float16" if half else "float32")
    network = loaded.model
    size = padded_size(*resized_size(*_PHOTO, loaded.info.resize))
    how = ("float16" if half else "float32") + ("" if prove else ", files not proven")
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), whole_float32():
        runs: dict[Way, Run] = {
            Way.EAGER: lambda images, sizes: network.infer(images.half() if half else images, sizes)
        }
        for way in ways:
            if way is not Way.EAGER:
                on_case(f"preparing {way}")
                try:
                    runs[way] = _prepare(way, model, runs[Way.EAGER], device, Path(folder), half, prove, on_case)
                except ExportError as error:  # the others are worth measuring all the same
                    on_case(f"left out: {way}: {error}")
        for batch in batches:
            images = _photos(batch, size).to(device)
            sizes = torch.tensor([size] * batch, device=device)
            measured: dict[Way, Measured] = {}
            for way, one in runs.items():
                case = f"{loaded.info.name}, {way}, batch {batch} of {size[0]}x{size[1]}"
                on_case(case)
                done = measure(partial(one, images, sizes), device, repeats)
                # What onnxruntime takes, torch does not count.
                measured[way] = replace(done, peak_mib=None) if way in (Way.ONNX, Way.ONNX_BODY) else done
                what = f"{case}, {how}; baseline eager"
                rows.append(measured_row(what, measured[way], measured[Way.EAGER], images=batch))
    return rows


def _prepare(
    way: Way,
    model: str,
    eager: Run,
    device: torch.device,
    folder: Path,
    half: bool,
    prove: bool,
    say: Callable[[str], None],
) -> Run:
    if way is Way.COMPILED:
        return torch.compile(eager, dynamic=False)
    kind = Format.ONNX if way is Way.ONNX_BODY else Format(way.value)
    path = folder / f"model{kind.suffix}"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters', about their own parts
            export(model, kind, folder, device=str(device), half=half, prove=prove, say=say)
    if kind is Format.ONNX:
        return _onnx_run(OnnxNetwork(path, str(device), with_library=way is Way.ONNX), device)
    return load_program(path, read_contract(path), device)


def _onnx_run(network: OnnxNetwork, device: torch.device) -> Run:
    """A session whose inputs and outputs stay on the device."""
    kind, number = device.type, device.index or 0

    def run_bound(images: Tensor, sizes: Tensor) -> None:
        binding = network.session.io_binding()
        for name, tensor, dtype in (("images", images, np.float32), ("sizes", sizes, np.int64)):
            binding.bind_input(name, kind, number, dtype, tuple(tensor.shape), tensor.data_ptr())
        for output in network.session.get_outputs():
            binding.bind_output(output.name, kind, number)
        network.session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run_bound


def _photos(batch: int, size: tuple[int, int]) -> Tensor:
    """Soft blotches float32 [B, 3, H, W] in 0..1, the same in every run."""
    coarse = torch.rand(batch, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
