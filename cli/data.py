"""`dsg data check`: what is wrong with an annotation file, before hours of training find out."""

from pathlib import Path
from typing import Annotated

import typer

from dsg.cli.progress import progress


def check(
    file: Annotated[Path, typer.Argument(help="Annotations in COCO format.", show_default=False)],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures.", show_default="images/ beside the file")
    ] = None,
) -> None:
    """Say what is in an annotation file and all that is wrong with it and its pictures.

    Exit code 2 if training would refuse the file.
    """
    from dsg.model.data.coco import check_file

    with progress("pictures") as advance:
        report = check_file(file, images, on_progress=advance)
    for line in report.errors:
        typer.echo(f"error: {line}")
    for line in report.warnings:
        typer.echo(f"warning: {line}")
    for line in report.summary():
        typer.echo(line)
    if not report.ok:
        raise ValueError(f"{file} cannot be used as it is: {len(report.errors)} errors, listed above")
