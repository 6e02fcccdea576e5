"""What `best.safetensors` says about itself: classes, resize, thresholds, data and their licences, AP."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from dsg.model.data.records import CocoData
from dsg.model.network.checkpoint import CheckpointError, CheckpointInfo, Resize, read_info, save_checkpoint
from dsg.model.network.predictor import shipped_weights
from dsg.model.training.config import Recipe
from dsg.model.training.recipe_file import to_table

_OWN_LICENCE = "Apache-2.0"


def describe(
    recipe: Recipe, data: CocoData, *, name: str, files: Sequence[str | Path], init: str | None
) -> CheckpointInfo:
    """The description of a run's network, before it is trained.

    Args:
        recipe: of the run.
        data: training pictures; their categories and licences go in.
        name: of the weights.
        files: the data files, whose names go into the notes.
        init: the weights that the run starts from; if they are a checkpoint, its licence goes on to hold.
    """
    predict = recipe.predict
    start = _start(init)
    notes = {
        "data": ", ".join(Path(file).name for file in files),
        "training_pictures": str(len(data.records)),
        "data_licences": "; ".join(f"{licence}: {n}" for licence, n in licence_counts(data).most_common()),
        "recipe": recipe.name,
        "recipe_json": json.dumps(to_table(replace(recipe, build_file=None)), sort_keys=True),
    }
    if init:
        notes["started_from"] = f"{start.name} ({start.licence})" if start else Path(init).name
    return CheckpointInfo(
        name=name,
        preset=recipe.model if recipe.build_file is None else recipe.build_file.name,
        overrides={**recipe.overrides, "max_detections": predict.max_detections},
        categories=data.categories,
        resize=Resize(predict.short_side, predict.long_side),
        score_threshold=predict.score_threshold,
        eval_score_threshold=predict.eval_score_threshold,
        max_detections=predict.max_detections,
        licence=_licence(data, start),
        notes=notes,
    )


def licence_counts(data: CocoData) -> Counter[str]:
    """Pictures of each licence; "not stated" for those whose file does not say."""
    return Counter(record.licence or "not stated" for record in data.records)


def save_best(
    path: Path,
    model: nn.Module,
    info: CheckpointInfo,
    recipe: Recipe,
    iteration: int,
    metrics: Mapping[str, float],
) -> None:
    """Writes the best weights so far, with how far training was and what they scored.

    Weights of a recipe's own network (`build_file`) are kept as plain tensors under the same description; no
    preset can build them again, so whoever wrote the network loads them with it.
    """
    scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "AP")
    info = replace(info, notes={**info.notes, "iterations": str(iteration), "validation": scores})
    if recipe.build_file is None:
        save_checkpoint(path, model, info, half=recipe.run.half)
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"own_network": info.to_json()})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _licence(data: CocoData, start: CheckpointInfo | None) -> str:
    """The project's own licence, and what the pictures' licences ask for beyond it."""
    counts = licence_counts(data)
    limits = []
    noncommercial = sum(count for licence, count in counts.items() if _is_noncommercial(licence))
    if noncommercial:
        limits.append(f"{noncommercial} of {len(data.records)} training pictures are under NonCommercial licences")
    if counts["not stated"]:
        limits.append(f"{counts['not stated']} of {len(data.records)} training pictures state no licence")
    if start and start.licence not in ("", _OWN_LICENCE):
        limits.append(f"started from {start.name}: {start.licence}")
    return "; ".join([_OWN_LICENCE, *limits])


def _is_noncommercial(licence: str) -> bool:
    words = licence.lower().replace("-", " ").split()
    return "nc" in words or "noncommercial" in licence.lower().replace("-", "")


def _start(init: str | None) -> CheckpointInfo | None:
    """The description of the weights that a run starts from, if they are a checkpoint."""
    if init is None:
        return None
    try:
        return read_info(shipped_weights().get(init, Path(init)))
    except (CheckpointError, FileNotFoundError):
        return None  # a backbone's weights have none
