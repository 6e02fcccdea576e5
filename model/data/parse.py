"""COCO JSON -> records, one careful pass for reading and for checking.

What makes a file unusable goes to `Findings.error`, what is left out or put right to `Findings.note`; both
get one line that names the file and the annotation. `read_coco` stops at the first error, `check_file`
collects all.
"""

import json
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from dsg.model.data.masks import draw_runs, has_area, polygon_points, rle_runs
from dsg.model.data.records import Annotation, CocoData, DataError, ImageRecord
from dsg.model.network.checkpoint import Category

_OUTSIDE = 1.0
"""Pixels by which a box may reach over the border without a note: annotation tools round."""

_FAR = 2**40
"""Pixels; no coordinate is as large. Not-a-number is not below it either."""

Segmentation = list[list[float]] | dict[str, Any] | None


class Findings(Protocol):
    """Where the parser tells what it finds."""

    def error(self, line: str) -> None:
        """Something that training cannot use; the parser leaves it out if this returns."""

    def note(self, kind: str, line: str) -> None:
        """Something that was left out or put right; `kind` is the same text for all of its kind."""


def load_json(path: Path) -> dict[str, Any]:
    """The document of a COCO file.

    Raises:
        DataError: no such file, not JSON, or not an object with lists of images, annotations and categories.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            document = json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a COCO JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); give a COCO JSON file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a COCO JSON file") from None
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: holds a {type(document).__name__}, not a COCO object; "
            "give a file with images, annotations and categories, not a list of results"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            what = f"{key!r} is no list" if key in document else f"has no {key!r}"
            raise DataError(f"{path}: {what}; a COCO file has lists of images, annotations and categories")
    return document


def parse(path: Path, document: dict[str, Any], images_dir: Path, findings: Findings) -> CocoData:
    """All records of a document; what `findings.error` was told about is left out.

    Args:
        path: the JSON file, for messages.
        document: as from `load_json`.
        images_dir: where the pictures' `file_name` starts from.
        findings: takes errors and notes.
    """
    categories, labels = _categories(path, document["categories"], findings)
    if not categories:
        findings.error(f"{path}: has no category; add the classes under 'categories'")
    images = _images(path, document["images"], findings)
    objects: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    seen: set[int] = set()
    for index, raw in enumerate(document["annotations"]):
        if not isinstance(raw, dict) or not _is_int(raw.get("id")):
            findings.error(f"{path}: annotation at index {index} has no whole number as 'id'; give it one")
            continue
        where = f"{path}: annotation {raw['id']}"
        if raw["id"] in seen:
            findings.error(f"{where}: its id is used twice; give each annotation its own")
            continue
        seen.add(raw["id"])
        image = raw.get("image_id")
        if not _is_int(image) or image not in images:
            findings.error(f"{where}: image_id is {image!r}, no image has that id; add the image or remove this")
            continue
        annotation = _annotation(where, raw, images[image], labels, findings)
        if annotation:
            objects[image].append(annotation)
    licences = _licences(document.get("licenses"))
    records = []
    for image_id, raw in images.items():
        licence = raw.get("license")
        name = licences.get(licence, str(licence)) if isinstance(licence, int | str) else ""
        file = images_dir / raw["file_name"]
        record = ImageRecord(image_id, file, raw["height"], raw["width"], tuple(objects[image_id]), name)
        records.append(record)
    return CocoData(tuple(records), categories)


def _categories(path: Path, raw: list[Any], findings: Findings) -> tuple[tuple[Category, ...], dict[int, int]]:
    """The categories in the file's order, and label by category id."""
    categories: list[Category] = []
    labels: dict[int, int] = {}
    names: set[str] = set()
    for index, entry in enumerate(raw):
        if not isinstance(entry, dict) or not _is_int(entry.get("id")) or not _is_text(entry.get("name")):
            findings.error(f"{path}: category at index {index} needs a whole number as 'id' and a 'name'")
            continue
        category, name = entry["id"], entry["name"]
        if category in labels:
            findings.error(f"{path}: category id {category} is used twice; give each category its own")
        elif name in names:
            findings.error(f"{path}: category name {name!r} is used twice; rename category {category}")
        else:
            above = entry.get("supercategory")
            categories.append(Category(category, name, above if isinstance(above, str) else ""))
            labels[category] = len(categories)
            names.add(name)
    return tuple(categories), labels


def _images(path: Path, raw: list[Any], findings: Findings) -> dict[int, dict[str, Any]]:
    """The sound image entries by id, in the file's order."""
    images: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(raw):
        if not isinstance(entry, dict) or not _is_int(entry.get("id")):
            findings.error(f"{path}: image at index {index} has no whole number as 'id'; give it one")
            continue
        where = f"{path}: image {entry['id']}"
        if entry["id"] in images:
            findings.error(f"{where}: its id is used twice; give each image its own")
            continue
        if not _is_text(entry.get("file_name")):
            findings.error(f"{where}: has no 'file_name'; add its path below the images directory")
            continue
        height, width = entry.get("height"), entry.get("width")
        if not (_is_int(height) and _is_int(width) and height > 0 and width > 0):
            findings.error(f"{where}: height and width are {height!r} and {width!r}; give its size in pixels")
            continue
        images[entry["id"]] = entry
    return images


def _licences(raw: Any) -> dict[Any, str]:
    entries = [entry for entry in raw if isinstance(entry, dict)] if isinstance(raw, list) else []
    named = [entry for entry in entries if isinstance(entry.get("id"), int | str) and _is_text(entry.get("name"))]
    return {entry["id"]: entry["name"] for entry in named}


def _annotation(
    where: str, raw: dict[str, Any], image: dict[str, Any], labels: dict[int, int], findings: Findings
) -> Annotation | None:
    """One annotation, or None if it is left out."""
    category, crowd = raw.get("category_id"), raw.get("iscrowd") or 0
    if not _is_int(category) or category not in labels:
        findings.error(f"{where}: category_id is {category!r}, no category has that id; add it or correct this")
        return None
    if crowd not in (0, 1):
        findings.error(f"{where}: iscrowd is {crowd!r}; it must be 0 or 1")
        return None
    height, width = image["height"], image["width"]
    try:
        segmentation = _segmentation(where, raw.get("segmentation"), height, width, findings)
        box = _box(raw["bbox"]) if raw.get("bbox") else _extent(segmentation, height, width)
    except ValueError as error:
        findings.error(f"{where}: {error}; correct or remove it")
        return None
    x1, y1, x2, y2 = box
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        what = "outside the picture" if x1 < x2 and y1 < y2 else "without an area"
        line = f"{where}: box {_shown(box)} is {what} ({height} x {width}); dropped"
        findings.note(f"dropped, the box is {what}", line)
        return None
    if max(-x1, -y1, x2 - width, y2 - height) > _OUTSIDE:
        line = f"{where}: box {_shown(box)} reaches out of the picture ({height} x {width}); clipped"
        findings.note("clipped, the box reaches out of the picture", line)
    if isinstance(segmentation, list) and _misses(segmentation, inside):
        line = f"{where}: no part of its polygon lies in its box {_shown(inside)}; used as a box without a mask"
        findings.note("used as a box, the polygon lies elsewhere", line)
        segmentation = None
    return Annotation(inside, labels[category], segmentation, bool(crowd), raw["id"])


def _misses(polygons: list[list[float]], box: tuple[float, ...]) -> bool:
    """Whether polygons [x, y, x, y, ...] lie wholly to one side of a box xyxy."""
    x = [value for polygon in polygons for value in polygon[::2]]
    y = [value for polygon in polygons for value in polygon[1::2]]
    return max(x) < box[0] or min(x) > box[2] or max(y) < box[1] or min(y) > box[3]


def _box(raw: Any) -> tuple[float, ...]:
    """xyxy from COCO's [x, y, width, height]."""
    if not isinstance(raw, list) or len(raw) != 4 or not all(type(value) in (int, float) for value in raw):
        raise ValueError(f"bbox is {str(raw)[:80]}, not [x, y, width, height] in numbers")
    if not all(abs(value) < _FAR for value in raw):
        raise ValueError(f"bbox {raw} has a value that is not finite or far too large")
    x, y, width, height = map(float, raw)
    if width < 0 or height < 0:
        raise ValueError(f"bbox {raw} has a negative width or height")
    return x, y, x + width, y + height


def _extent(segmentation: Segmentation, height: int, width: int) -> tuple[float, ...]:
    """The box xyxy around a mask, for an annotation without a bbox."""
    if segmentation is None:
        raise ValueError("has neither a bbox nor a mask to take one from")
    if isinstance(segmentation, dict):
        box = draw_runs(rle_runs(segmentation, height, width), height).box()
        assert box is not None  # an RLE without a pixel is no mask
        return box
    corners = np.concatenate([polygon_points(polygon) for polygon in segmentation])
    return *corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()


def _segmentation(where: str, raw: Any, height: int, width: int, findings: Findings) -> Segmentation:
    """What of a segmentation can be drawn; None if no mask is known."""
    if raw is None or raw == [] or raw == {}:
        return None
    if isinstance(raw, dict):
        if rle_runs(raw, height, width)[1::2].any():
            return raw
        findings.note("box only, its RLE has no pixel", f"{where}: the RLE has no pixel; used as a box only")
        return None
    if not isinstance(raw, list):
        raise ValueError(f"segmentation is a {type(raw).__name__}, not polygons or RLE")
    if type(raw[0]) in (int, float):
        raise ValueError("segmentation is one flat list of numbers, each polygon needs a list of its own")
    sound = [polygon for polygon in raw if has_area(polygon_points(polygon))]
    if len(sound) < len(raw):
        count = f"{len(raw) - len(sound)} of {len(raw)} polygons"
        then = "left out" if sound else "used as a box only"
        line = f"{where}: {count} have fewer than 3 points or no area; {then}"
        findings.note(f"{then}, polygons of fewer than 3 points or no area", line)
    return sound or None


def _shown(box: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"


def _is_int(value: Any) -> TypeGuard[int]:
    return type(value) is int


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)
