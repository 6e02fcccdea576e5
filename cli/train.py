"""`dsg train`: a recipe and annotation files in, a run folder out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsg.cli.loading import DeviceOption

if TYPE_CHECKING:
    from dsg.model.training.config import Recipe


def train(
    config: Annotated[str, typer.Option(help="A recipe's name, or a TOML or Python file.", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Annotations in COCO format; repeat to join files.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.", show_default=False)],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder of each file's pictures, in the same order.",
            show_default="images/ beside the file",
        ),
    ] = None,
    val: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Annotations to validate on.",
            show_default="a tenth of the pictures, by a hash of their id",
        ),
    ] = None,
    val_images: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of their pictures.", show_default="images/ beside the file"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Weights to start from: a name, a checkpoint or a backbone's file.", show_default="random"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one number of the recipe; repeat."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Train a network.

    Writes best.safetensors (by validation AP), last (for --resume), metrics.jsonl and TensorBoard events.
    With several GPUs: torchrun --nproc-per-node N -m dsg.cli train ...
    """
    from dsg.model.training.recipe_file import load_recipe
    from dsg.model.training.run import train as run_training

    recipe = load_recipe(config, settings or ())
    _say_what_cannot_be_exported(recipe)
    run_training(
        recipe,
        data,
        images or (),
        out=out,
        val=val or (),
        val_images=val_images or (),
        init=init,
        resume=resume,
        device=device,
    )


def _say_what_cannot_be_exported(recipe: "Recipe") -> None:
    """Whoever wants to deploy a network should learn this before training it, not after."""
    if recipe.build_file is not None:
        typer.echo("note: dsg export takes presets only, not a network of a recipe's own code", err=True)
        return
    from dsg.export.exportable import refusals
    from dsg.model.network.presets import preset_config

    for kind, reason in refusals(preset_config(recipe.model, **recipe.overrides)).items():
        typer.echo(f"note: this network will have no {kind} export: {reason}", err=True)
