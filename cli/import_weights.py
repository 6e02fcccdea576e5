"""`dsg import-weights`: weights of other projects as a checkpoint of this one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Source(StrEnum):
    """Projects whose weights are understood."""

    TORCHVISION = "torchvision"


class Classes(StrEnum):
    """Which outputs of the file to keep."""

    COCO80 = "coco80"


def import_weights(
    file: Annotated[Path, typer.Argument(help="State dict, .pth or .safetensors.", show_default=False)],
    source: Annotated[Source, typer.Option("--from", help="The project that wrote it.", show_default=False)],
    model: Annotated[str, typer.Option(help="Preset to fill, such as mask_rcnn_r50_fpn.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).", show_default=False)],
    classes: Annotated[
        Classes | None,
        typer.Option(help="Of 91 outputs keep the 80 that COCO uses.", show_default="all outputs"),
    ] = None,
    bn_eps: Annotated[
        float | None, typer.Option(help="Epsilon of its batch norms.", show_default="what that project uses")
    ] = None,
) -> None:
    """Convert weights into a checkpoint that predicts what the original predicts."""
    from dsg.model.network.import_torchvision import import_torchvision

    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} in")
    info = import_torchvision(file, model, out, classes=classes.value if classes else None, bn_eps=bn_eps)
    typer.echo(f"{out}: {info.preset}, {len(info.categories)} classes")
