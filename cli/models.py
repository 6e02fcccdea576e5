"""`dsg models`: the networks that can be built and the weights that come with the package."""

import json
from typing import Annotated, Any

import typer


def models(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the presets with their parameter counts, and the weights that ship."""
    presets, weights = _presets(), _weights()
    if as_json:
        typer.echo(json.dumps({"presets": presets, "weights": weights}, indent=2, ensure_ascii=False))
        return
    typer.echo("Presets (trainable parameters with 80 classes):")
    for preset in presets:
        typer.echo(f"  {preset['name']:<24} {preset['parameters'] / 1e6:7.2f} M")
        for kind, reason in preset["no_export"].items():
            typer.echo(f"  {'':<24} no {kind} export: {reason}")
    typer.echo("Weights in this package:")
    for weight in weights:
        names = ", ".join(weight["classes"][:4]) + (", ..." if len(weight["classes"]) > 4 else "")
        typer.echo(
            f"  {weight['name']:<24} {weight['preset']}, {len(weight['classes'])} classes ({names}), "
            f"{weight['bytes'] / 1e6:.1f} MB, up to {weight['max_detections']} detections a picture"
        )
        typer.echo(f"  {'':<24} lowest score that is shown by default: {weight['threshold_in_words']}")
        typer.echo(f"  {'':<24} licence: {weight['licence']}")
        for key, note in weight["notes"].items():
            if key == "recipe_json":  # a page of numbers; --json has it
                continue
            typer.echo(f"  {'':<24} {key}: {note}")
    if not weights:
        typer.echo("  none")


def _presets() -> list[dict[str, Any]]:
    """Every preset with its exports and the number of its parameters, counted without making a single tensor."""
    import torch

    from dsg.export.contract import Format
    from dsg.export.exportable import refusals
    from dsg.model import build, presets

    counted = []
    for name in presets():
        with torch.device("meta"):
            network = build(name)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        refused = refusals(network.config)
        exports = [kind.value for kind in Format if kind.value not in refused]
        counted.append({"name": name, "parameters": parameters, "exports": exports, "no_export": refused})
    return counted


def _weights() -> list[dict[str, Any]]:
    """What the description of every shipped checkpoint says."""
    from dsg.model.network.checkpoint import read_info
    from dsg.model.network.predictor import shipped_weights

    described = []
    for name, path in shipped_weights().items():
        info = read_info(path)
        described.append(
            {
                "name": name,
                "preset": info.preset,
                "classes": info.category_names,
                "threshold_in_words": info.threshold_in_words,
                "score_threshold": info.score_threshold,
                "class_thresholds": list(info.class_thresholds),
                "class_precision": info.class_precision,
                "max_detections": info.max_detections,
                "bytes": path.stat().st_size,
                "licence": info.licence,
                "version": info.version,
                "hash": info.hash,
                "notes": info.notes,
            }
        )
    return described
