"""What all importers share: names are translated, the network is filled completely, the checkpoint is written."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsg.model.network.build import build
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint
from dsg.model.network.coco_classes import COCO80
from dsg.model.network.guided_start import guided_start, lacks_guidance

COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Imported:
    """A network of another project in our terms."""

    source: str
    """Which project."""
    tensors: dict[str, Tensor]
    """By our names."""
    categories: tuple[Category, ...]
    overrides: dict[str, Any]
    """Its conventions, as fields of `DetectorConfig`."""
    resize: Resize
    score_threshold: float = 0.05
    paste: str = "box"
    notes: dict[str, str] = field(default_factory=dict)


def rename(
    theirs: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], dropped: str = r"(?!)"
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of theirs that fit no rule.

    Args:
        rules: (pattern on the whole of their name, our name with the pattern's groups).
        dropped: pattern of names that hold nothing a network needs.
    """
    tensors, unknown = {}, []
    for name, tensor in theirs.items():
        if name.endswith(COUNTER) or re.fullmatch(dropped, name):
            continue
        for pattern, replacement in rules:
            if re.fullmatch(pattern, name):
                tensors[re.sub(pattern, replacement, name)] = tensor.float()
                break
        else:
            unknown.append(name)
    return tensors, unknown


def write_imported(
    path: str | os.PathLike[str], model_name: str, out: str | os.PathLike[str], imported: Imported
) -> CheckpointInfo:
    """Fill the preset and write its checkpoint.

    A preset with guidance also takes a file of its plain counterpart; see `guided_start`.

    Raises:
        ValueError: the file lacks a tensor of the preset, has one more, or one of another shape.
    """
    with torch.device("meta"):  # names and shapes; no tensor of it is kept
        model = build(model_name, len(imported.categories), **imported.overrides)
    wanted = model.state_dict()
    tensors, notes = dict(imported.tensors), dict(imported.notes)
    if lacks_guidance(wanted, tensors):
        if not model.config.guidance_per_class:
            raise ValueError(
                f"{path} has no masks of proposals, and {model_name} cannot start from its predictions without;"
                f" choose --model {model_name.replace('dsc_', 'cascade_dsg_')}"
            )
        fresh = build(model_name, len(imported.categories), **imported.overrides).state_dict()
        tensors |= guided_start(fresh, tensors)
        notes["guidance"] = "from a plain network: off until it is trained"
    # counters of batch norms, which nothing depends on
    tensors |= {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in wanted.items() if name.endswith(COUNTER)
    }
    for name, tensor in wanted.items():
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name} of {model_name} is missing in the file")
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path}: tensor {name} is {found}, {model_name} wants {expected}")
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        raise ValueError(f"{path}: no place for tensor {extra[0]} in {model_name}; choose another --model")
    model.load_state_dict(tensors, assign=True)
    info = CheckpointInfo(
        name=Path(out).stem,
        preset=model_name,
        overrides=imported.overrides,
        categories=imported.categories,
        resize=imported.resize,
        score_threshold=imported.score_threshold,
        eval_score_threshold=imported.score_threshold,
        max_detections=100,
        licence="as the imported file",
        paste=imported.paste,
        notes={"imported": f"{imported.source} file {Path(path).name}", **notes},
    )
    return save_checkpoint(out, model, info)


def refuse_unknown(path: str | os.PathLike[str], unknown: Sequence[str], model_name: str, project: str) -> None:
    """ValueError for a file with tensors that fit no rule."""
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if unknown[1:] else ""
        raise ValueError(
            f"{path}: no place for tensor {unknown[0]}{more} in {model_name}; is it a network of {project} that the"
            " preset names?"
        )


def background_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads of a project that counts background last, or gives it no offsets and no mask, in our order: background is
    output 0; where the file has nothing for it, zeros, which nothing reads."""
    ordered = dict(tensors)
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        classes = len(tensors.get(f"{layer.rpartition('.')[0]}.classifier.bias", ())) - 1
        if layer.endswith("box_head.classifier"):
            ordered[name] = torch.cat([tensor[-1:], tensor[:-1]])
        elif layer.endswith("box_head.regressor") and len(tensor) == 4 * classes > 4:
            ordered[name] = torch.cat([torch.zeros_like(tensor[:4]), tensor])
        elif layer.endswith("mask_head.predictor") and len(tensor) > 1:
            ordered[name] = torch.cat([torch.zeros_like(tensor[:1]), tensor])
    return ordered


def rgb_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution of a network that was fed BGR, for RGB."""
    name = "backbone.body.conv1.weight"
    turned = dict(tensors)
    if name in turned:
        turned[name] = turned[name].flip(1)
    return turned


def outputs_of(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], project: str) -> int:
    """Class outputs of the (first) box head, background included."""
    for name in ("box_head.classifier.bias", "stages.0.box_head.classifier.bias"):
        if name in tensors:
            return len(tensors[name])
    raise ValueError(f"{path}: it has no class scores of a box head; is it a Mask R-CNN of {project}?")


def categories_of(classes: int, names: Sequence[str] = ()) -> tuple[Category, ...]:
    """80 classes are COCO's unless the file names others; else they are counted from 1."""
    coco = [category.name for category in COCO80]
    if classes == len(COCO80) and (not names or [name.replace("_", " ") for name in names] == coco):
        return COCO80
    if len(names) != classes:
        names = [f"class {number}" for number in range(1, classes + 1)]
    return tuple(Category(number, name) for number, name in enumerate(names, start=1))
