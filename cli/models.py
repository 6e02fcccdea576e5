"""`dsg models`: the networks that can be built and the weights that come with the package."""

import json
from typing import Annotated, Any

import typer

_SWITCHES = (
    "cascade",
    "interleaved",
    "mrpn",
    "fuse_mask",
    "sgra_box",
    "fuse_box",
    "sgra_mask",
    "mask_iou",
    "panet",
    "normalised_heads",
    "dcn",
    "dcn_modulated",
)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Count parameters and arithmetic anew, and keep the table (a minute).")
    ] = False,
) -> None:
    """List the presets with their size, arithmetic and switches, and the weights that ship or can be imported."""
    if measure:
        from dsg.model.network.cost import measure_all

        typer.echo(f"measured: {measure_all()}", err=True)
    presets, table_1, weights = _presets(), _table_1(), _weights()
    if as_json:
        document = {"presets": presets, "table_1": table_1, "weights": weights}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    typer.echo("Presets (80 classes; parameters without frozen norms; multiply-adds of a picture of 800 x 1333):")
    for preset in presets:
        switches = ", ".join(preset["switches"]) or "-"
        known = " ".join(sorted({weight["from"] for weight in preset["known_weights"]}))
        line = f"  {preset['name']:<36} {preset['parameters'] / 1e6:7.2f} M {preset['gflops']:8.1f} G  {switches}"
        typer.echo(line + (f"; weights: {known}" if known else ""))
        for kind, reason in preset["no_export"].items():
            typer.echo(f"  {'':<36} no {kind} export: {reason}")
    typer.echo("Table 1 of the paper, R-50:")
    for row in table_1:
        typer.echo(f"  {', '.join(row['switches']) or 'Mask R-CNN':<52} {row['parameters'] / 1e6:7.2f} M")
    typer.echo("Weights of other projects (dsg pull URL, then dsg import-weights FILE --from PROJECT --model PRESET):")
    for url, project in dict.fromkeys((w["url"], w["from"]) for p in presets for w in p["known_weights"]):
        typer.echo(f"  {project:<12} {url}")
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
    """Every preset: size and arithmetic, what is switched on, its exports, and which files of others fill it."""
    from dsg.export.contract import Format
    from dsg.export.exportable import refusals
    from dsg.model import presets
    from dsg.model.network.cost import known_costs
    from dsg.model.network.known_weights import weights_for
    from dsg.model.network.presets import preset_config

    costs = known_costs()
    listed = []
    for name in presets():
        config = preset_config(name)
        refused = refusals(config)
        listed.append(
            {
                "name": name,
                "parameters": costs[name].parameters,
                "gflops": costs[name].gflops,
                "switches": _switches(config),
                "exports": [kind.value for kind in Format if kind.value not in refused],
                "no_export": refused,
                "known_weights": [{"from": known.project, "url": known.url} for known in weights_for(name)],
            }
        )
    return listed


def _switches(config: Any) -> list[str]:
    """Booleans that are on and decide what is built, and the semantic branch."""
    named = [*_SWITCHES, *(["semantic"] if config.semantic != "off" else [])]
    return [name for name in named if getattr(config, name)]


def _table_1() -> list[dict[str, Any]]:
    """Sizes of the paper's Table 1."""
    from dsg.model.network.cost import SWITCHES, TABLE_1, table_1

    rows = zip(TABLE_1, table_1(), strict=True)
    return [
        {"switches": list(SWITCHES[:on]), "parameters": cost.parameters, "gflops": cost.gflops} for on, cost in rows
    ]


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
