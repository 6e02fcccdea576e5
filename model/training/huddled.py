"""Average precision where objects crowd together: section 6.1 and Table 4 of the paper.

An object is huddled if its box overlaps another object's box of the same image by more than an IoU of T_O.
An image belongs to the subset of (T_O, T_P) if more than T_P of its objects are huddled. Crowd regions are
no objects here.

A subset may hold few objects of a class, or none, so AP is not a mean over classes but over all objects:
detections are matched with objects of their own class, as always, and then those of all classes are ranked
together, which gives one curve of precision and recall for each IoU threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from dsg.model.training.coco_instances import (
    GroundTruth,
    ImageId,
    Instance,
    read_ground_truth,
    read_results,
)
from dsg.model.training.evaluation import (
    AREA_RANGES,
    Matches,
    detection_limit,
    mean_of_known,
)

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Of T_O and of T_P in the paper's table."""


@dataclass(frozen=True)
class HuddledRow:
    """One subset; AP in fractions of 1, None where the subset has no object or the results have no masks."""

    overlap_threshold: float | None
    """T_O; None for all images of the annotations (-1 in the paper's table)."""

    proportion_threshold: float | None
    """T_P; None for all images of the annotations."""

    images: int
    """Images of the subset."""

    objects: int
    """Objects in them."""

    bbox: float | None
    """AP of boxes."""

    segm: float | None
    """AP of masks."""


def huddled_subsets(
    annotations: Mapping[str, Any] | str | Path, overlap_threshold: float, proportion_threshold: float
) -> list[ImageId]:
    """Ids of the images of which more than `proportion_threshold` of the objects are huddled.

    Args:
        annotations: a COCO file, as its path or its content.
        overlap_threshold: T_O, an IoU; an object is huddled above it. Below 0 every object is.
        proportion_threshold: T_P, a fraction of an image's objects.

    Returns:
        Image ids in the order of the file; an image without objects is in no subset.

    Raises:
        ValueError: broken annotations; one line that names the entry.
    """
    overlaps = _largest_overlaps(read_ground_truth(annotations, with_masks=False))
    return _subset(overlaps, overlap_threshold, proportion_threshold)


def evaluate_huddled(
    annotations: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    max_detections: int | None = None,
) -> list[HuddledRow]:
    """AP over all objects, of all images and of each subset of the paper's table.

    Args:
        annotations, results, max_detections: as for `evaluate_results`.

    Returns:
        The row of all images, then one for each T_O and, within it, each T_P.

    Raises:
        ValueError: broken annotations or results; one line that names the entry.
    """
    truth = read_ground_truth(annotations, with_masks=True)
    found, has_masks = read_results(list(results), truth)
    limit = detection_limit(truth, max_detections)
    overlaps = _largest_overlaps(truth)
    objects = {image_id: len(of_image) for image_id, of_image in overlaps.items()}
    pooled, found, pairs = _one_class(truth, found)
    everything = {"all": AREA_RANGES["all"]}
    matches = {
        kind: Matches(pooled, found, kind, limit, everything) for kind in (("bbox", "segm") if has_masks else ("bbox",))
    }

    def row(overlap: float | None, proportion: float | None, image_ids: Sequence[ImageId]) -> HuddledRow:
        chosen = {number for image_id in image_ids for number in pairs[image_id]}
        average = {kind: mean_of_known(one.curves(chosen).precision[..., -1]) for kind, one in matches.items()}
        number = sum(objects.get(image_id, 0) for image_id in image_ids)
        return HuddledRow(overlap, proportion, len(image_ids), number, average["bbox"], average.get("segm"))

    return [row(None, None, list(truth.sizes))] + [
        row(overlap, proportion, _subset(overlaps, overlap, proportion))
        for overlap in THRESHOLDS
        for proportion in THRESHOLDS
    ]


def format_huddled(rows: Sequence[HuddledRow]) -> str:
    """The rows as a table of text like the paper's: box AP / mask AP in percent, `-` where there is none."""
    cells = {(row.overlap_threshold, row.proportion_threshold): _cell(row) for row in rows}
    lines = [
        f"all images: {cells[None, None]}",
        "  T_O \\ T_P" + "".join(f"{value:>15.1f}" for value in THRESHOLDS),
    ]
    for overlap in THRESHOLDS:
        lines.append(f"{overlap:>11.1f}" + "".join(f"{cells[overlap, value]:>15}" for value in THRESHOLDS))
    return "\n".join(lines)


def _largest_overlaps(truth: GroundTruth) -> dict[ImageId, np.ndarray]:
    """Of each image with objects: the largest IoU of each object's box with another's, [objects]."""
    boxes: dict[ImageId, list[list[float]]] = {image_id: [] for image_id in truth.sizes}
    for one in truth.instances:
        if not one.crowd:
            boxes[one.image_id].append(list(one.box))
    overlaps = {}
    for image_id, of_image in boxes.items():
        if of_image:
            iou = np.array(coco_mask.iou(of_image, of_image, [0] * len(of_image)))  # [objects, objects]
            np.fill_diagonal(iou, 0.0)
            overlaps[image_id] = iou.max(axis=1)
    return overlaps


def _subset(overlaps: Mapping[ImageId, np.ndarray], overlap: float, proportion: float) -> list[ImageId]:
    return [image_id for image_id, largest in overlaps.items() if (largest > overlap).mean() > proportion]


def _one_class(
    truth: GroundTruth, found: Sequence[Instance]
) -> tuple[GroundTruth, list[Instance], dict[ImageId, list[ImageId]]]:
    """Every class of every image as an image of its own, with one class, and which of these an image became.

    So matching stays within image and class, and all is ranked on one curve.
    """
    numbers: dict[tuple[ImageId, int], ImageId] = {}
    for one in (*truth.instances, *found):
        numbers.setdefault((one.image_id, one.category_id), len(numbers))
    objects, detections = (
        [replace(one, image_id=numbers[one.image_id, one.category_id], category_id=1) for one in group]
        for group in (truth.instances, found)
    )
    pairs: dict[ImageId, list[ImageId]] = {image_id: [] for image_id in truth.sizes}
    for (image_id, _), number in numbers.items():
        pairs[image_id].append(number)
    sizes = {number: truth.sizes[image_id] for (image_id, _), number in numbers.items()}
    return GroundTruth(sizes, {1: "any"}, objects), detections, pairs


def _cell(row: HuddledRow) -> str:
    return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in (row.bbox, row.segm))
