"""COCO annotations and results, checked entry by entry and brought into the one form that evaluation works
on.

Boxes here are COCO's own (x, y, w, h) in pixels, since every number is compared with what COCO's evaluation
gives.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray

from dsg.ops.rle import rle_counts, rles_counts

ImageId = int | str

# Masks are checked together, in groups that keep the arrays for it small.
_MASKS_AT_ONCE = 4096


@dataclass(frozen=True)
class Instance:
    """One annotation or one result."""

    image_id: ImageId
    category_id: int
    box: tuple[float, float, float, float]
    """(x, y, w, h) in pixels."""

    area: float
    """Decides whether an object is small, medium or large; in square pixels."""

    crowd: bool = False
    """A region to ignore: detections inside it are neither right nor wrong."""

    rle: Mapping[str, Any] | None = None
    """The mask as COCO RLE, or None where the entry has none."""

    score: float = 1.0


@dataclass(frozen=True)
class GroundTruth:
    """A checked annotation file."""

    sizes: Mapping[ImageId, tuple[int, int] | None]
    """(H, W) of each image, in the order of the file; None where the file does not say."""

    categories: Mapping[int, str]
    """Name of each category id; a name that several ids have is followed by the id."""

    instances: Sequence[Instance]


def read_ground_truth(annotations: Mapping[str, Any] | str | Path, with_masks: bool) -> GroundTruth:
    """Check a COCO annotation file, given as its path or as its content.

    Args:
        annotations: keys `images`, `categories` and `annotations`, as in COCO.
        with_masks: whether masks are wanted; without, segmentations are not looked at.

    Raises:
        ValueError: in one line, what is wrong with which entry.
    """
    document = _read_json(annotations) if isinstance(annotations, (str, Path)) else annotations
    for key in ("images", "categories", "annotations"):
        if not isinstance(document, Mapping) or not isinstance(document.get(key), Sequence):
            raise ValueError(f"annotations have no list '{key}'; a COCO file has images, categories and annotations")
    sizes: dict[ImageId, tuple[int, int] | None] = {}
    for index, image in enumerate(document["images"]):
        if "id" not in image or image["id"] in sizes:
            raise ValueError(f"image {index} of the annotations has no id, or the id of an image before it")
        known = "height" in image and "width" in image
        sizes[image["id"]] = (int(image["height"]), int(image["width"])) if known else None
    categories = _category_names(document["categories"])
    entries = document["annotations"]
    names = [
        f"annotation {entry.get('id', f'number {index}')} of image {entry.get('image_id')}"
        for index, entry in enumerate(_mappings(entries, "annotation"))
    ]
    areas = _compressed_areas(entries, names) if with_masks else [None] * len(entries)
    instances = [
        _read_instance(entry, name, sizes, categories, with_masks, area)
        for entry, name, area in zip(entries, names, areas, strict=True)
    ]
    return GroundTruth(sizes, categories, instances)


def read_results(results: Sequence[Mapping[str, Any]], truth: GroundTruth) -> tuple[list[Instance], bool]:
    """Check COCO results against the images and categories of the annotations.

    Returns:
        The results, and whether they have masks: either all do or none; no results count as having masks.

    Raises:
        ValueError: in one line, what is wrong with which entry.
    """
    names = [
        f"result {index} (image {entry.get('image_id')})" for index, entry in enumerate(_mappings(results, "result"))
    ]
    has_masks = all(_has_mask(entry) for entry in results)
    areas = _compressed_areas(results, names) if has_masks else [None] * len(results)
    instances = []
    for entry, name, area in zip(results, names, areas, strict=True):
        if not has_masks and _has_mask(entry):
            raise ValueError(f"{name} has a segmentation and others have none; give one to all results or to none")
        if not has_masks and entry.get("bbox") is None:
            raise ValueError(f"{name} has neither bbox nor segmentation")
        score: Any = entry.get("score")
        if not _is_number(score):
            raise ValueError(f"{name}: score must be a finite number, not {score!r}")
        instances.append(
            _read_instance(entry, name, truth.sizes, truth.categories, has_masks, area, score=float(score))
        )
    return instances, has_masks


def max_objects_in_an_image(annotations: Mapping[str, Any] | str | Path) -> int:
    """Objects of the fullest picture, crowd regions not counted; 0 where there are no objects."""
    return fullest_image(read_ground_truth(annotations, with_masks=False))


def fullest_image(truth: GroundTruth) -> int:
    """`max_objects_in_an_image` of annotations that are read already."""
    return max(Counter(one.image_id for one in truth.instances if not one.crowd).values(), default=0)


def box_region(box: Sequence[float], size: tuple[int, int]) -> Mapping[str, Any]:
    """The pixels of a box (x, y, w, h) as RLE."""
    return coco_mask.frPyObjects([list(box)], *size)[0]


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _category_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    for index, category in enumerate(categories):
        if "id" not in category or "name" not in category:
            raise ValueError(f"category {index} of the annotations needs an id and a name")
    names = Counter(category["name"] for category in categories)
    return {
        category["id"]: category["name"] if names[category["name"]] == 1 else f"{category['name']} ({category['id']})"
        for category in categories
    }


def _mappings(entries: Sequence[Any], kind: str) -> Sequence[Mapping[str, Any]]:
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{kind} {index} must be an object with image_id and category_id, not {entry!r}")
    return entries


def _compressed_areas(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[int | None]:
    """Pixels of the masks that are compressed RLE, checked many at once; None for other entries."""
    areas: list[int | None] = [None] * len(entries)
    compressed = [index for index, entry in enumerate(entries) if _is_compressed(entry.get("segmentation"))]
    for begin in range(0, len(compressed), _MASKS_AT_ONCE):
        group = compressed[begin : begin + _MASKS_AT_ONCE]
        try:
            counts = rles_counts([entries[index]["segmentation"] for index in group])
        except ValueError:
            counts = [_named_counts(entries[index]["segmentation"], names[index]) for index in group]
        for index, numbers in zip(group, counts, strict=True):
            areas[index] = int(numbers[1::2].sum())
    return areas


def _named_counts(rle: Mapping[str, Any], name: str) -> NDArray[np.int64]:
    try:
        return rle_counts(rle)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_instance(
    entry: Mapping[str, Any],
    name: str,
    sizes: Mapping[ImageId, tuple[int, int] | None],
    categories: Mapping[int, str],
    with_masks: bool,
    mask_area: int | None,
    score: float | None = None,
) -> Instance:
    """An annotation, or a result where it has a score; a result's area is that of what is found, box or mask.

    `mask_area` is given for compressed RLE, which is checked by then.
    """
    image_id: Any = entry.get("image_id")
    category_id: Any = entry.get("category_id")
    if image_id not in sizes:
        raise ValueError(f"{name}: the annotations have no image {image_id!r}")
    if category_id not in categories:
        raise ValueError(f"{name}: the annotations have no category {category_id!r}")
    rle = None
    if with_masks and _has_mask(entry):
        rle = _read_mask(entry["segmentation"], name, sizes[image_id])
    box: Any = entry.get("bbox")
    if box is None and rle is not None:
        box = coco_mask.toBbox([rle])[0].tolist()
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise ValueError(f"{name}: bbox must be four finite numbers x, y, width, height, not {box!r}")
    x, y, w, h = map(float, box)
    area: Any = entry.get("area")
    if score is not None or not _is_number(area):
        if rle is None:
            area = w * h
        else:
            area = coco_mask.area([rle])[0] if mask_area is None else mask_area
    crowd = score is None and bool(entry.get("iscrowd", 0))
    return Instance(image_id, category_id, (x, y, w, h), float(area), crowd, rle, 1.0 if score is None else score)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _has_mask(entry: Mapping[str, Any]) -> bool:
    """Whether there is a segmentation that is not empty: `[]` is how COCO files say that there is none."""
    segmentation = entry.get("segmentation")
    return any(segmentation) if isinstance(segmentation, list) else bool(segmentation)


def _is_compressed(segmentation: Any) -> bool:
    return isinstance(segmentation, Mapping) and isinstance(segmentation.get("counts"), (str, bytes))


def _read_mask(segmentation: Any, name: str, size: tuple[int, int] | None) -> Mapping[str, Any]:
    """Polygons, plain RLE or (checked already) compressed RLE as compressed RLE."""
    if size is None:
        raise ValueError(f"{name} has a mask, and its image has no height and width in the annotations")
    if isinstance(segmentation, Mapping):
        compressed = _is_compressed(segmentation)
        counts = None if compressed else _named_counts(segmentation, name).tolist()
        found = tuple(segmentation["size"])
        if found != size:
            raise ValueError(f"{name}: its mask has size {list(found)}, its image {list(size)}")
        return segmentation if compressed else coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    polygons = [polygon for polygon in segmentation if polygon]
    for polygon in polygons:
        numbers = isinstance(polygon, Sequence) and all(map(_is_number, polygon))
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"{name}: a polygon must be 6, 8 or more finite numbers, x and y in turn")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
