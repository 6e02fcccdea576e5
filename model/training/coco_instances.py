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

from faster_coco_eval.core import mask as coco_mask

from dsg.ops.rle import rle_area, rle_counts

ImageId = int | str


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
            raise ValueError(
                f"annotations have no list '{key}'; a COCO file has images, categories and annotations"
            )
    sizes: dict[ImageId, tuple[int, int] | None] = {}
    for index, image in enumerate(document["images"]):
        if "id" not in image or image["id"] in sizes:
            raise ValueError(f"image {index} of the annotations has no id, or the id of an image before it")
        known = "height" in image and "width" in image
        sizes[image["id"]] = (int(image["height"]), int(image["width"])) if known else None
    categories = _category_names(document["categories"])
    instances = []
    for index, entry in enumerate(document["annotations"]):
        where = f"annotation {entry.get('id', f'number {index}')} of image {entry.get('image_id')}"
        instances.append(_read_instance(entry, where, sizes, categories, with_masks))
    return GroundTruth(sizes, categories, instances)


def read_results(results: Sequence[Mapping[str, Any]], truth: GroundTruth) -> tuple[list[Instance], bool]:
    """Check COCO results against the images and categories of the annotations.

    Returns:
        The results, and whether they have masks: either all do or none; no results count as having masks.

    Raises:
        ValueError: in one line, what is wrong with which entry.
    """
    has_masks = all(_has_mask(entry) for entry in results)
    instances = []
    for index, entry in enumerate(results):
        where = f"result {index} (image {entry.get('image_id')})"
        if not has_masks and _has_mask(entry):
            raise ValueError(
                f"{where} has a segmentation and others have none; give one to all results or to none"
            )
        if not has_masks and entry.get("bbox") is None:
            raise ValueError(f"{where} has neither bbox nor segmentation")
        score = entry.get("score")
        if not _is_number(score):
            raise ValueError(f"{where}: score must be a finite number, not {score!r}")
        instance = _read_instance(entry, where, truth.sizes, truth.categories, has_masks, score=float(score))
        instances.append(instance)
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
        category["id"]: category["name"]
        if names[category["name"]] == 1
        else f"{category['name']} ({category['id']})"
        for category in categories
    }


def _read_instance(
    entry: Mapping[str, Any],
    where: str,
    sizes: Mapping[ImageId, tuple[int, int] | None],
    categories: Mapping[int, str],
    with_masks: bool,
    score: float | None = None,
) -> Instance:
    """An annotation, or a result where it has a score; a result's area is that of what is found, box or
    mask."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if image_id not in sizes:
        raise ValueError(f"{where}: the annotations have no image {image_id!r}")
    if category_id not in categories:
        raise ValueError(f"{where}: the annotations have no category {category_id!r}")
    rle = (
        _read_mask(entry["segmentation"], where, sizes[image_id]) if with_masks and _has_mask(entry) else None
    )
    box = entry.get("bbox")
    if box is None and rle is not None:
        box = coco_mask.toBbox([rle])[0].tolist()
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise ValueError(f"{where}: bbox must be four finite numbers x, y, width, height, not {box!r}")
    x, y, w, h = map(float, box)
    if score is None and _is_number(entry.get("area")):
        area = float(entry["area"])
    else:
        area = w * h if rle is None else float(rle_area(dict(rle)))
    crowd = score is None and bool(entry.get("iscrowd", 0))
    return Instance(image_id, category_id, (x, y, w, h), area, crowd, rle, 1.0 if score is None else score)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _has_mask(entry: Mapping[str, Any]) -> bool:
    """Whether there is a segmentation that is not empty: `[]` is how COCO files say that there is none."""
    segmentation = entry.get("segmentation")
    return any(segmentation) if isinstance(segmentation, list) else bool(segmentation)


def _read_mask(segmentation: Any, where: str, size: tuple[int, int] | None) -> Mapping[str, Any]:
    """Polygons, plain or compressed RLE as compressed RLE."""
    if size is None:
        raise ValueError(f"{where} has a mask, and its image has no height and width in the annotations")
    if isinstance(segmentation, Mapping):
        try:
            counts = rle_counts(dict(segmentation))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if tuple(segmentation["size"]) != size:
            raise ValueError(
                f"{where}: its mask has size {list(segmentation['size'])}, its image {list(size)}"
            )
        if isinstance(segmentation["counts"], (str, bytes)):
            return segmentation
        return coco_mask.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    polygons = [polygon for polygon in segmentation if polygon]
    for polygon in polygons:
        if (
            not isinstance(polygon, Sequence)
            or len(polygon) < 6
            or len(polygon) % 2
            or not all(map(_is_number, polygon))
        ):
            raise ValueError(
                f"{where}: a polygon must be an even count of at least 6 finite numbers, x and y in turn"
            )
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
