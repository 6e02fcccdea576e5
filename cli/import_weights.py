"""`dsg import-weights`: weights of other projects as a checkpoint of this one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Source(StrEnum):
    """Projects whose weights are understood."""

    TORCHVISION = "torchvision"
    DETECTRON2 = "detectron2"
    MMDET = "mmdet"


class Classes(StrEnum):
    """Which outputs of the file to keep."""

    COCO80 = "coco80"


def import_weights(
    file: Annotated[
        Path, typer.Argument(help="Its weights: .pth, .pkl or .safetensors; no code in it is run.", show_default=False)
    ],
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
    """Convert weights into a checkpoint that predicts what the original predicts.

    A preset with guidance, such as dsg_r50_fpn, takes the weights of its plain counterpart and starts from its
    predictions; training it brings the guidance in.
    """
    from dsg.model.network.import_detectron2 import import_detectron2
    from dsg.model.network.import_mmdet import import_mmdet
    from dsg.model.network.import_torchvision import import_torchvision

    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} in")
    if classes is not None and source is not Source.TORCHVISION:
        raise ValueError(f"--classes is for torchvision's 91 outputs; files of {source.value} hold 80: leave it out")
    if source is Source.DETECTRON2:
        info = import_detectron2(file, model, out, bn_eps)
    elif source is Source.MMDET:
        info = import_mmdet(file, model, out, bn_eps)
    else:
        info = import_torchvision(file, model, out, classes.value if classes else None, bn_eps)
    typer.echo(f"{out}: {info.preset}, {len(info.categories)} classes")
