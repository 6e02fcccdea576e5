"""COCO files as training data: read them, join several by category name, split off a validation part."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsg.model.data.check import Report, check_file
from dsg.model.data.parse import load_json, parse
from dsg.model.data.records import Annotation, CocoData, DataError, ImageRecord
from dsg.model.network.checkpoint import Category

__all__ = [
    "Annotation",
    "CocoData",
    "DataError",
    "ImageRecord",
    "Report",
    "check_file",
    "join",
    "read_coco",
    "split",
]

_log = logging.getLogger(__name__)


class _StopAtError:
    """Findings of a reader: the first error ends it, the rest is counted."""

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()

    def error(self, line: str) -> None:
        raise DataError(line)

    def note(self, kind: str, line: str) -> None:
        self.notes[kind] += 1


def read_coco(json_path: str | Path, images_dir: str | Path | None = None) -> CocoData:
    """A COCO file's pictures and objects; the pictures themselves are not looked at.

    Boxes are clipped to the picture. Objects whose box has no area left are dropped, and so are polygons of
    fewer than 3 points; how many is logged. A box that is not given is taken from the mask; an object
    without a mask has segmentation None. Pictures without objects are kept.

    Args:
        json_path: a COCO instances file.
        images_dir: where `file_name` starts from; None: `images/` beside the file.

    Raises:
        DataError: the file or something in it cannot be used; one line that names file and annotation.
    """
    path = Path(json_path)
    findings = _StopAtError()
    data = parse(path, load_json(path), _images_dir(path, images_dir), findings)
    if not data.records:
        raise DataError(f"{path}: has no image; add the pictures under 'images'")
    for kind, count in findings.notes.items():
        _log.warning("%s: %d annotations: %s", path, count, kind)
    return data


def _images_dir(path: Path, images_dir: str | Path | None) -> Path:
    return path.parent / "images" if images_dir is None else Path(images_dir)


def join(parts: Sequence[CocoData]) -> CocoData:
    """Several files as one set, categories joined by name.

    A category has the id and supercategory of the first file that names it; one whose id an earlier file uses for
    another name gets the next number above all ids, which is said in the log. Labels follow the order in which
    names first come up. Image ids stay as they are, but one that an
    earlier part uses already becomes the next number above all ids; `ImageRecord.file_id` then keeps the
    old one. Annotation ids stay, and are unique within their own file only.

    Args:
        parts: at least one.

    Raises:
        DataError: nothing to join.
    """
    if not parts:
        raise DataError("no data to join; give at least one COCO file")
    categories: list[Category] = []
    labels: dict[str, int] = {}
    taken: set[int] = set()
    next_category = 1 + max((category.id for part in parts for category in part.categories), default=0)
    for part in parts:
        for category in part.categories:
            if category.name in labels:
                continue
            if category.id in taken:
                _log.warning(
                    "category %r has id %d in the joined set, since an earlier file uses its id %d for another name",
                    category.name, next_category, category.id,
                )  # fmt: skip
                category, next_category = replace(category, id=next_category), next_category + 1
            categories.append(category)
            taken.add(category.id)
            labels[category.name] = len(categories)
    next_id = 1 + max((record.id for part in parts for record in part.records), default=0)
    records: list[ImageRecord] = []
    seen: set[int] = set()
    for part in parts:
        new_labels = [0] + [labels[category.name] for category in part.categories]
        for record in part.records:
            objects = tuple(replace(one, category_id=new_labels[one.category_id]) for one in record.annotations)
            if record.id in seen:
                file_id = record.id if record.file_id is None else record.file_id
                record, next_id = replace(record, id=next_id, file_id=file_id), next_id + 1
            seen.add(record.id)
            records.append(replace(record, annotations=objects))
    return CocoData(tuple(records), tuple(categories))


def split(data: CocoData, fraction: float = 0.1) -> tuple[CocoData, CocoData]:
    """A training and a validation part, by picture.

    A picture is for validation if the first 8 bytes of the SHA-256 of its id in decimal (`file_id` where
    `join` gave it another), read as a big-endian number over 2**64, are below `fraction`. So it depends on
    nothing but the id: not on the machine, the run, the order, or which other pictures there are. Only
    where a small set would leave a part empty, that part gets one picture: validation the one with the
    lowest number, training the one with the highest.

    Args:
        data: at least two pictures.
        fraction: expected share of the validation part, above 0 and below 1.

    Returns:
        (training, validation), both with all categories and in the order of `data`.

    Raises:
        DataError: fewer than two pictures.
        ValueError: `fraction` out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must lie between 0 and 1")
    if len(data.records) < 2:
        raise DataError("one picture cannot be split into training and validation; give a validation file")
    places = [_place(record.id if record.file_id is None else record.file_id) for record in data.records]
    order = sorted(range(len(places)), key=places.__getitem__)
    chosen = {index for index in order if places[index] < fraction} or {order[0]}
    if len(chosen) == len(order):
        chosen.remove(order[-1])
    train = tuple(record for index, record in enumerate(data.records) if index not in chosen)
    val = tuple(record for index, record in enumerate(data.records) if index in chosen)
    return replace(data, records=train), replace(data, records=val)


def _place(image_id: int) -> float:
    """0 to 1, even over ids."""
    return int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:8], "big") / 2**64
