"""`dsg export`: a trained model as a file for another runtime."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsg.cli.loading import DEFAULT_MODEL, ModelOption, pictures_in


class Kind(StrEnum):
    """The formats, spelled here so that `--help` imports nothing."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    AOTI = "aoti"


def export(
    kind: Annotated[Kind, typer.Option("--format", help="What to write.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for model.onnx, model.ts or model.pt2.", show_default=False)],
    model: ModelOption = DEFAULT_MODEL,
    half: Annotated[bool, typer.Option("--half", help="Compute in float16: half the size, quick on a GPU.")] = False,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures, or folders of them, to prove the file with, beside made-up ones."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:1: what aoti compiles for, and where the file is proven."),
    ] = None,
) -> None:
    """Write a model as ONNX, TorchScript or AOTInductor, and prove that the file gives what the model gives.

    The file runs in a fresh process, on pictures and batches of several sizes. One that differs is not kept.
    """
    from dsg.export.contract import Format
    from dsg.export.writing import export as write

    path = write(
        model,
        Format(kind.value),
        out,
        device=device,
        half=half,
        pictures=pictures_in(images or []),
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, equal to the model")
