"""Models by name or path, for the commands that predict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsg.model.network.predictor import Predictor

DEFAULT_MODEL = "dsg_lite0_coco"

ModelOption = Annotated[
    str, typer.Option("--model", help="A name that `dsg models` lists, a checkpoint, or an exported file.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:1; the first GPU if there is one, else the CPU."),
]

_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


PrecisionOption = Annotated[
    str,
    typer.Option("--precision", help="float32, float16 or bfloat16; auto is float16 on a GPU, float32 on a CPU."),
]
ProposalsOption = Annotated[
    int | None,
    typer.Option(help="Regions of a picture that the heads look at.", show_default="the checkpoint's own number"),
]


def load_predictor(
    model: str, device: str | None, precision: str = "auto", proposals: int | None = None
) -> "Predictor":
    """A Predictor for a shipped name, a checkpoint or an exported file.

    Raises:
        ValueError: an unknown name, or a file that cannot be run, no such device here, an unknown precision.
        FileNotFoundError: no such file.
    """
    from dsg.export import load

    return load(model, device, precision, proposals)  # type: ignore[arg-type]  # a text is checked there


def pictures_in(paths: list[Path]) -> list[Path]:
    """The files of a command line, with every folder replaced by the pictures in it, sorted by name.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder that holds no picture.
    """
    pictures: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no picture ({', '.join(sorted(_PICTURE_SUFFIXES))})")
            pictures += inside
        elif path.is_file():
            pictures.append(path)
        else:
            raise FileNotFoundError(f"no picture at {path}")
    return pictures
