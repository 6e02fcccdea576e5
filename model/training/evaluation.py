"""COCO average precision of boxes and masks.

The arithmetic is faster-coco-eval's, equal to that of pycocotools: ten IoU thresholds from .50 to .95,
precision at 101 recalls, the mean over classes that have objects. All images of the annotations count, also
those without detections. What pycocotools leaves open is settled here:

* `max_detections` is the number of detections that count for each class in an image. COCO's own is 100, where
  even a perfect detector cannot score 1 on pictures of more objects; by default it is as large as the fullest
  picture needs, and at least 100.
* A value for which there is no object (pycocotools' -1) is None, and `null` in JSON.
* An object with a box and no mask is an object to box evaluation. To mask evaluation its box is a crowd
  region: no miss where nothing is found, and no error where something is found inside.
* The size of a detection, which matters where it matches nothing, is its box's area in box evaluation and its
  mask's in mask evaluation. (pycocotools takes the box's in both when results hold both.)

Letters, as in COCO: `T` IoU thresholds, `R` recalls, `K` classes, `A` area ranges, `M` detection limits.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from dsg.model.training.coco_instances import (
    GroundTruth,
    ImageId,
    Instance,
    box_region,
    fullest_image,
    max_objects_in_an_image,
    read_ground_truth,
    read_results,
)

__all__ = ["Evaluation", "evaluate_results", "format_table", "max_objects_in_an_image"]

AREA_RANGES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""COCO's sizes of objects, in square pixels."""

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """What `dsg eval` reports; fractions of 1, None where there is no object to tell."""

    max_detections: int
    """Detections that counted for each class in an image."""

    bbox: Metrics
    """AP, AP50, AP75, APs, APm, APl, AR1, AR10 and ARmax of boxes."""

    segm: Metrics | None
    """The same of masks; None where the results have no masks."""

    per_class: dict[str, dict[str, Metrics]]
    """By class name and kind (bbox, segm): AP and AP50."""

    def as_dict(self) -> dict[str, Any]:
        """The document that `dsg eval --out` writes, without a part that the results cannot give."""
        parts: dict[str, Any] = {"max_detections": self.max_detections, "bbox": self.bbox}
        if self.segm is not None:
            parts["segm"] = self.segm
        return {**parts, "per_class": self.per_class}


@dataclass(frozen=True)
class Curves:
    """COCO's accumulated arrays; -1 where a class has no object in an area range."""

    precision: NDArray[np.float64]  # [T, R, K, A, M]
    recall: NDArray[np.float64]  # [T, K, A, M]


def evaluate_results(
    annotations: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    max_detections: int | None = None,
    image_ids: Sequence[ImageId] | None = None,
) -> Evaluation:
    """Evaluate COCO results, boxes or masks or both.

    Args:
        annotations: a COCO file, as its path or its content.
        results: `image_id`, `category_id`, `score`, and `bbox` (x, y, w, h) or `segmentation` or both. Masks
            without boxes get the boxes around them.
        max_detections: best detections of each class in an image that count, at least 1; None for the larger
            of 100 and the objects of the fullest picture.
        image_ids: images to evaluate, all by default; results of other images are left out.

    Raises:
        ValueError: broken annotations or results; one line that names the entry.
    """
    results = list(results)
    truth = read_ground_truth(annotations, with_masks=True)
    found, has_masks = read_results(results, truth)
    if image_ids is not None:
        unknown = [image_id for image_id in image_ids if image_id not in truth.sizes]
        if unknown:
            raise ValueError(f"image_ids has {unknown[0]!r}, which the annotations do not have")
        truth, found = of_images(truth, found, set(image_ids))
    limit = detection_limit(truth, max_detections)

    # Of no results, and objects without masks, nothing says that masks were meant.
    has_masks = has_masks and (bool(found) or any(one.rle is not None for one in truth.instances))
    kinds = ["bbox", "segm"] if has_masks else ["bbox"]
    metrics: dict[str, Metrics] = {}
    per_class: dict[str, dict[str, Metrics]] = {name: {} for name in truth.categories.values()}
    for kind in kinds:
        curves = Matches(truth, found, kind, limit, AREA_RANGES).curves()
        metrics[kind] = _metrics(curves)
        for index, category_id in enumerate(_in_order(truth.categories)):
            precision = curves.precision[:, :, index, 0, -1]  # [T, R]
            per_class[truth.categories[category_id]][kind] = {
                "AP": mean_of_known(precision),
                "AP50": mean_of_known(precision[0]),
            }
    return Evaluation(limit, metrics["bbox"], metrics.get("segm"), per_class)


def detection_limit(truth: GroundTruth, max_detections: int | None) -> int:
    """`max_detections`, or what it is by default."""
    if max_detections is None:
        return max(100, fullest_image(truth))
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, not {max_detections}")
    return max_detections


def of_images(
    truth: GroundTruth, found: Sequence[Instance], image_ids: set[ImageId]
) -> tuple[GroundTruth, list[Instance]]:
    """The part of annotations and results that belongs to some images."""
    sizes = {image_id: size for image_id, size in truth.sizes.items() if image_id in image_ids}
    instances = [one for one in truth.instances if one.image_id in image_ids]
    return replace(truth, sizes=sizes, instances=instances), [one for one in found if one.image_id in image_ids]


class Matches:
    """Detections matched with objects, image by image; curves can be drawn over all images or any part of them.

    Args:
        kind: "bbox" or "segm".
        area_ranges: name -> smallest and largest area; they become axis A in their order. Axis K is the category
            ids in rising order, axis M the limits 1, 10 and `max_detections`.
    """

    def __init__(
        self,
        truth: GroundTruth,
        found: Sequence[Instance],
        kind: str,
        max_detections: int,
        area_ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        limits = [1, min(10, max_detections), max_detections]
        self.image_ids = _in_order(truth.sizes)
        self.shape = (len(truth.categories), len(area_ranges), len(limits))
        if kind == "segm":
            objects = [_mask_object(one, truth) for one in truth.instances]
        else:
            objects = [replace(one, rle=None) for one in truth.instances]
            found = [replace(one, rle=None, area=one.box[2] * one.box[3]) for one in found]
        evaluator = COCOeval_faster(_coco(objects, truth), _coco(found, truth), kind, separate_eval=True)
        evaluator.params.maxDets = limits
        evaluator.params.areaRng = [list(span) for span in area_ranges.values()]
        evaluator.params.areaRngLbl = list(area_ranges)
        self.evaluator = evaluator
        if self.image_ids and truth.categories:
            evaluator.evaluate()
            # By category and area range, one entry for each image. The evaluator draws its curves from this list.
            self.by_image = np.array(evaluator._evalImgs_cpp, dtype=object).reshape(-1, len(self.image_ids))

    def curves(self, image_ids: Collection[ImageId] | None = None) -> Curves:
        """Precision and recall over these images, by default all."""
        chosen = [i for i, one in enumerate(self.image_ids) if image_ids is None or one in image_ids]
        if not chosen or 0 in self.shape:
            return Curves(np.full((10, 101, *self.shape), -1.0), np.full((10, *self.shape), -1.0))
        self.evaluator._evalImgs_cpp = self.by_image[:, chosen].ravel().tolist()
        self.evaluator._paramsEval.imgIds = [i + 1 for i in chosen]
        self.evaluator.accumulate()
        return Curves(self.evaluator.eval["precision"], self.evaluator.eval["recall"])


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as lines of text, in percent, `-` where there is no object to tell."""
    kinds = {"bbox": evaluation.bbox} | ({} if evaluation.segm is None else {"segm": evaluation.segm})
    lines = [f"At most {evaluation.max_detections} detections of each class in an image (COCO: 100)."]
    lines.append(" " * 6 + "".join(f"{name:>7}" for name in evaluation.bbox))
    for kind, metrics in kinds.items():
        lines.append(f"{kind:6}" + "".join(f"{_percent(value):>7}" for value in metrics.values()))
    width = max(map(len, evaluation.per_class), default=0)
    columns = [f"{kind} {name}" for kind in kinds for name in ("AP", "AP50")]
    lines += ["", " " * width + "".join(f"{column:>11}" for column in columns)]
    for name, parts in evaluation.per_class.items():
        values = [value for kind in kinds for value in parts[kind].values()]
        lines.append(f"{name:{width}}" + "".join(f"{_percent(value):>11}" for value in values))
    return "\n".join(lines)


def mean_of_known(values: NDArray[np.float64]) -> float | None:
    """Mean of the values that are not COCO's -1; None where all are."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _metrics(curves: Curves) -> Metrics:
    """COCO's nine numbers, of the last detection limit unless their name says another."""
    precision, recall = curves.precision[..., -1], curves.recall  # [T, R, K, A], [T, K, A, M]
    return {
        "AP": mean_of_known(precision[:, :, :, 0]),
        "AP50": mean_of_known(precision[0, :, :, 0]),
        "AP75": mean_of_known(precision[5, :, :, 0]),
        "APs": mean_of_known(precision[:, :, :, 1]),
        "APm": mean_of_known(precision[:, :, :, 2]),
        "APl": mean_of_known(precision[:, :, :, 3]),
        "AR1": mean_of_known(recall[:, :, 0, 0]),
        "AR10": mean_of_known(recall[:, :, 0, 1]),
        "ARmax": mean_of_known(recall[:, :, 0, 2]),
    }


def _in_order(ids: Mapping[Any, Any]) -> list[Any]:
    """Ids as pycocotools orders them, which decides between equal scores; names in the order of the file."""
    return sorted(ids) if all(isinstance(one, int) for one in ids) else list(ids)


def _mask_object(one: Instance, truth: GroundTruth) -> Instance:
    """An object for mask evaluation: a region to ignore where it has no mask."""
    if one.rle is not None:
        return one
    size = truth.sizes[one.image_id]
    if size is None:
        raise ValueError(f"image {one.image_id!r} of the annotations lacks height and width, which masks need")
    return replace(one, crowd=True, rle=box_region(one.box, size))


def _coco(instances: Sequence[Instance], truth: GroundTruth) -> COCO:
    """Instances as the evaluator takes them.

    Its ids have to be whole numbers, and it takes an annotation of id 0 for none, so all are counted anew
    from 1.
    """
    images = {one: number for number, one in enumerate(_in_order(truth.sizes), start=1)}
    categories = {one: number for number, one in enumerate(_in_order(truth.categories), start=1)}
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": number, "height": size[0], "width": size[1]}
            for image_id, number in images.items()
            for size in [truth.sizes[image_id] or (0, 0)]
        ],
        "categories": [{"id": number, "name": str(number)} for number in categories.values()],
        "annotations": [
            {
                "id": number,
                "image_id": images[one.image_id],
                "category_id": categories[one.category_id],
                "bbox": list(one.box),
                "area": one.area,
                "iscrowd": int(one.crowd),
                "score": one.score,
                **({} if one.rle is None else {"segmentation": one.rle}),
            }
            for number, one in enumerate(instances, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
