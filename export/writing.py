"""`dsg export`: write a file, prove it, and only then put it where it was asked for."""

import copy
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsg.export import writers
from dsg.export.container import attach
from dsg.export.contract import OUTPUTS, Contract, ExportError, Format
from dsg.export.exportable import refusal
from dsg.export.graph import ExportGraph, pad_images
from dsg.export.op_library import OP_LIBRARY
from dsg.export.proof import FLOAT16, FLOAT32, NOTHING, Arrays, Comparison, Tolerance, compare
from dsg.export.proof_cases import Case, cases_of_pictures, made_up_cases
from dsg.model.network import predictor
from dsg.model.network.detector import Detector
from dsg.model.network.float32 import whole_float32

_WRITERS: dict[Format, Callable[[ExportGraph, Path, torch.device], tuple[str, ...]]] = {
    Format.ONNX: writers.write_onnx,
    Format.TORCHSCRIPT: writers.write_torchscript,
    Format.AOTI: writers.write_aoti,
}
_LIBRARIES = {Format.ONNX: ("torch", "onnx", "onnxscript"), Format.TORCHSCRIPT: ("torch",), Format.AOTI: ("torch",)}


def export(
    model: str | os.PathLike[str],
    kind: Format,
    out: Path,
    *,
    device: str | None = None,
    half: bool = False,
    pictures: Sequence[Path] = (),
    prove: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `out/model.onnx`, `.ts` or `.pt2`, run it in a fresh process, and compare it with the model.

    What was at that place stays until the new file is proven; a file that differs is not left behind.

    Args:
        model: a name of `dsg models`, or a checkpoint.
        out: folder; it is made if it is not there.
        device: where to compile (.pt2) and to prove; None is a GPU if there is one for .pt2, else the CPU.
        half: compute in float16.
        pictures: further pictures to prove with, beside made-up ones; the first 20 are used.
        prove: False keeps the file unseen. For speed alone: a network that is not trained finds ties, which come in
            another order from each runtime.
        say: told what is being done, and the differences.

    Returns:
        the file.

    Raises:
        ExportError: the model has no such export, or the file does not give what the model gives.
        FileNotFoundError, ValueError: no such model, a broken one, no such device.
    """
    if Path(model).suffix.lower() in {one.suffix for one in Format}:
        raise ValueError(f"{os.fspath(model)} is an exported file already; export the checkpoint that it was made from")
    loaded = predictor.load(model, device if device or kind is Format.AOTI else "cpu", "float32")
    detector, info, target = loaded.model, loaded.info, loaded.device
    assert isinstance(detector, Detector)
    reason = refusal(detector.config, kind)
    if reason is not None:
        raise ExportError(f"{info.name} has no {kind} export: {reason}")
    contract = Contract(
        format=kind,
        checkpoint=info,
        precision="float16" if half else "float32",
        device=target.type if kind is Format.AOTI else "any",
        ops=(),
        ops_are_needed=kind is not Format.ONNX,
        written_by=_written_by(kind, target),
    )
    out.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that it moves there in one step, and in a folder that goes away whatever happens.
    with tempfile.TemporaryDirectory(prefix=".dsg-export-", dir=out) as folder:
        written = Path(folder) / f"model{kind.suffix}"
        say(f"writing {kind} of {info.name}" + (" (takes minutes)" if kind is Format.AOTI else ""))
        with whole_float32():
            # The compiler chooses layouts of its own.
            channels_last = kind is Format.TORCHSCRIPT or (kind is Format.AOTI and not half)
            ops = _WRITERS[kind](ExportGraph(detector, half, channels_last), written, target)
        contract = attach(written, replace(contract, ops=ops))
        if contract.ops_are_needed:
            say(f"whoever loads it must have loaded these operators before: {', '.join(contract.ops)}")
        if prove:
            say(f"proving it in a fresh process, checksum {contract.checksum[:12]}")
            _prove(written, contract, detector, target, made_up_cases(half) + cases_of_pictures(pictures, info), say)
        result = out / written.name
        written.replace(result)
    return result


def _written_by(kind: Format, device: torch.device) -> str:
    parts = [f"dsg {version('dsg')}"]
    for name in _LIBRARIES[kind]:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name) from None
    if kind is Format.AOTI:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        parts.append(f"for {where}")
    return ", ".join(parts)


# --- the proof ------------------------------------------------------------------------------------


def _prove(
    path: Path,
    contract: Contract,
    detector: Detector,
    device: torch.device,
    cases: Sequence[Case],
    say: Callable[[str], None],
) -> None:
    """Raise ExportError unless the file gives what the detector gives, in every way that it can be run."""
    expected = [_run_eager(detector, case, device) for case in cases]
    tolerance = FLOAT32
    if contract.precision == "float16":
        halved = copy.deepcopy(detector).half()
        kept = NOTHING
        for case, wanted in zip(cases, expected, strict=True):
            kept = kept + compare(wanted, _run_eager(halved, case, device), FLOAT16)
        say(f"the model in float16 against itself in float32: {kept}")
        tolerance = replace(FLOAT16, matched=FLOAT16.matched * kept.share)
    ways: list[tuple[str, tuple[str, ...]]] = [("", ())]
    if contract.format is Format.ONNX:
        ways = [("the op by its body", ("plain",))]
        if OP_LIBRARY.is_file():
            ways.append(("the op by its native kernels", ()))
    for way, options in ways:
        total = NOTHING
        for case, wanted, found in zip(cases, expected, _run_fresh(path, cases, device, options), strict=True):
            comparison = _compare(path, case, wanted, found, tolerance)
            say(f"  {case.name}: {comparison}")
            total = total + comparison
        say(f"{way or path.name}: {total}")
        if total.share < tolerance.matched:
            raise ExportError(f"the {contract.format} file differs from the model and was not kept: {total}")


def _compare(path: Path, case: Case, wanted: Arrays, found: Arrays, tolerance: Tolerance) -> Comparison:
    try:
        return compare(wanted, found, tolerance)
    except ValueError as error:
        raise ExportError(f"the file differs from the model and was not kept: {case.name}: {error}") from None


@torch.inference_mode()
def _run_eager(detector: Detector, case: Case, device: torch.device) -> Arrays:
    images = torch.from_numpy(case.images).to(device)
    with whole_float32():
        outputs = detector.infer(pad_images(images).to(detector.dtype), torch.from_numpy(case.sizes).to(device))
    return {name: output.cpu().numpy() for name, output in zip(OUTPUTS, outputs, strict=True)}


def _run_fresh(path: Path, cases: Sequence[Case], device: torch.device, options: Sequence[str]) -> list[Arrays]:
    """The file's results from a process that has loaded nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        batches, results = Path(folder) / "batches.npz", Path(folder) / "results.npz"
        arrays: dict[str, Any] = {}
        for number, case in enumerate(cases):
            arrays |= {f"{number}.images": case.images, f"{number}.sizes": case.sizes}
        np.savez(batches, **arrays)
        files = (str(file) for file in (path, batches, results))
        command = [sys.executable, "-m", "dsg.export.proof_worker", *files, str(device), *options]
        # The file was written a moment ago, by this very process.
        environment = {**os.environ, "DSG_TRUST_CODE": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode != 0:
            reason = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
            raise ExportError(f"the file does not run in a fresh process and was not kept: {reason}")
        with np.load(results) as found:
            return [{name: found[f"{number}.{name}"] for name in OUTPUTS} for number in range(len(cases))]
