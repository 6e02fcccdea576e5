"""What `best.safetensors` says about itself: classes, resize, thresholds, data and their licences, AP."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dsg.model.data.records import CocoData
from dsg.model.network.atomic import replacing
from dsg.model.network.build import build
from dsg.model.network.checkpoint import CheckpointError, CheckpointInfo, Resize, read_info, save_checkpoint
from dsg.model.network.config import FIELD_NAMES
from dsg.model.network.detector import Detector
from dsg.model.network.predictor import weights_path
from dsg.model.network.presets import preset_config, presets
from dsg.model.training.config import Recipe
from dsg.model.training.recipe_file import to_table

_OWN_LICENCE = "Apache-2.0"


def describe(
    recipe: Recipe,
    model: nn.Module,
    data: CocoData,
    *,
    name: str,
    files: Sequence[str | Path],
    origin: Mapping[str, str],
) -> CheckpointInfo:
    """The description of a run's network.

    Args:
        recipe: of the run.
        model: the network; one from a recipe's Python file is described by the preset that it is nearest to.
        data: training pictures; their categories and licences go in.
        name: of the weights.
        files: the data files, whose names go into the notes.
        origin: of the weights that the run began with, as `origin_of` gives it.
    """
    predict = recipe.predict
    preset, overrides = recipe.model, {**recipe.overrides, "max_detections": predict.max_detections}
    if recipe.build_file is not None:
        preset, overrides = _nearest_preset(model) or (recipe.build_file.name, {})
    notes = {
        "data": ", ".join(Path(file).name for file in files),
        "training_pictures": str(len(data.records)),
        "data_licences": "; ".join(f"{licence}: {n}" for licence, n in licence_counts(data).most_common()),
        "recipe": recipe.name,
        "recipe_json": json.dumps(to_table(replace(recipe, build_file=None)), sort_keys=True),
    }
    if origin:
        notes["started_from"] = origin["name"]
    return CheckpointInfo(
        name=name,
        preset=preset,
        overrides=overrides,
        categories=data.categories,
        resize=Resize(predict.short_side, predict.long_side),
        score_threshold=predict.score_threshold,
        eval_score_threshold=predict.eval_score_threshold,
        max_detections=model.config.max_detections if isinstance(model, Detector) else predict.max_detections,
        paste="grid",  # torchvision's rounds boxes to whole pixels: 4 points of mask AP where objects are small
        licence=_licence(data, origin),
        notes=notes,
    )


def origin_of(init: str | None) -> dict[str, str]:
    """Name and licence (empty where unknown) of the weights that a run begins with; {} for random ones."""
    if init is None:
        return {}
    try:
        info = read_info(weights_path(init))
    except CheckpointError:  # a backbone's weights say nothing about themselves
        return {"name": Path(init).name, "licence": ""}
    return {"name": info.name, "licence": info.licence}


def licence_counts(data: CocoData) -> Counter[str]:
    """Pictures of each licence; "not stated" for those whose file does not say."""
    return Counter(record.licence or "not stated" for record in data.records)


def save_best(
    path: Path,
    model: nn.Module,
    info: CheckpointInfo,
    *,
    iteration: int,
    metrics: Mapping[str, float],
    half: bool,
) -> None:
    """Writes the best weights so far, with how far training was and what they scored; in float16 if `half`.

    Weights of a network that no preset builds are kept as plain tensors under the same description; whoever
    wrote the network loads them with it.
    """
    scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "AP")
    info = replace(info, notes={**info.notes, "iterations": str(iteration), "validation": scores})
    if info.preset in presets():
        save_checkpoint(path, model, info, half=half)
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"own_network": info.to_json()})


def _licence(data: CocoData, origin: Mapping[str, str]) -> str:
    """The project's own licence, and what the pictures' licences ask for beyond it."""
    counts = licence_counts(data)
    limits = []
    noncommercial = sum(count for licence, count in counts.items() if _is_noncommercial(licence))
    if noncommercial:
        limits.append(f"{noncommercial} of {len(data.records)} training pictures are under NonCommercial licences")
    if counts["not stated"]:
        limits.append(f"{counts['not stated']} of {len(data.records)} training pictures state no licence")
    if origin.get("licence", "") not in ("", _OWN_LICENCE):
        limits.append(f"started from {origin['name']}: {origin['licence']}")
    return "; ".join([_OWN_LICENCE, *limits])


def _is_noncommercial(licence: str) -> bool:
    words = licence.lower().replace("-", " ").split()
    return "nc" in words or "noncommercial" in licence.lower().replace("-", "")


def _nearest_preset(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The preset with overrides that builds a network of these tensors; None where there is none."""
    if not isinstance(model, Detector):
        return None
    config = model.config
    differing = {
        name: {
            field: getattr(config, field)
            for field in FIELD_NAMES
            if field != "num_classes" and getattr(config, field) != getattr(preset_config(name), field)
        }
        for name in presets()
    }
    name = min(differing, key=lambda one: len(differing[one]))
    with torch.device("meta"):
        twin = build(name, config.num_classes, **differing[name])
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (model, twin)]
    return (name, differing[name]) if shapes[0] == shapes[1] else None
