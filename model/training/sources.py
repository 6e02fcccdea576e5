"""Which pictures a run trains and validates on."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsg.model.data.coco import join, read_coco, split
from dsg.model.data.records import CocoData
from dsg.model.network.atomic import replacing
from dsg.model.training.errors import TrainingError
from dsg.model.training.validate import ground_truth

PathLike = str | Path


def read_sets(
    files: Sequence[PathLike],
    folders: Sequence[PathLike | None],
    val_files: Sequence[PathLike],
    val_folders: Sequence[PathLike | None],
) -> tuple[CocoData, CocoData]:
    """The training and the validation set.

    Args:
        files: COCO files for training, joined by category name.
        folders: where each file's pictures are; where None or absent, `images/` beside the file.
        val_files, val_folders: the same for validation; without them a tenth of the training pictures, by a
            hash of the image id.

    Raises:
        TrainingError: no file, or more folders than files.
        DataError: a file that cannot be used.
    """
    data, val = _read(files, folders, "--data"), _read(val_files, val_folders, "--val")
    if data is None:
        raise TrainingError("no training data: give --data TRAIN.json, a COCO file")
    return (data, val) if val else split(data)


def write_held_out(path: Path, data: CocoData) -> None:
    """The pictures that a run does not train on, as a COCO file for `dsg eval --annotations FILE --images FOLDER`.

    Args:
        path: file to write; names of pictures are relative to its folder, which is what --images takes.
        data: the pictures.
    """
    document = ground_truth(data)
    for image, record in zip(document["images"], data.records, strict=True):
        image["file_name"] = os.path.relpath(record.path, path.parent)
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(document))


def digest_of(data: CocoData) -> str:
    """SHA-256 of what a resumed run must find again: categories, and which pictures with how many objects."""
    content: list[Any] = [[category.id, category.name] for category in data.categories]
    content += [[record.id, record.path.name, len(record.annotations)] for record in data.records]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def first_pictures(data: CocoData, count: int) -> CocoData:
    """The `count` pictures with the lowest image ids; 0: all."""
    if not count:
        return data
    return replace(data, records=tuple(sorted(data.records, key=lambda record: record.id)[:count]))


def _read(files: Sequence[PathLike], folders: Sequence[PathLike | None], flag: str) -> CocoData | None:
    if len(folders) > len(files):
        raise TrainingError(
            f"{flag}: {len(folders)} image folders for {len(files)} annotation files; give them in pairs"
        )
    padded = [*folders, *[None] * (len(files) - len(folders))]
    parts = [read_coco(file, folder) for file, folder in zip(files, padded, strict=True)]
    return join(parts) if parts else None
