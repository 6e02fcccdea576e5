"""Score thresholds of a stated precision: for each class the lowest score from which on enough detections are right.

Right is what COCO calls so at an IoU of .5 of boxes: in each image and class, detections take objects in falling score,
each the free object that it overlaps most. Most classes have few validation objects, so a class's own share of right
detections is mixed with that of all classes: it counts as if `support` more detections had been seen, of which as many
are right as among all detections of that score or a higher one.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray

from dsg.model.network.checkpoint import CheckpointInfo
from dsg.model.training.coco_instances import Instance, read_ground_truth, read_results

_IOU = 0.5
_ROUNDING = 1e-12  # what a quotient that is equal to the precision may lack


def with_class_thresholds(
    info: CheckpointInfo,
    truth: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int | None],
    precision: float,
) -> CheckpointInfo:
    """A checkpoint's description with the thresholds that `class_thresholds` chooses, which takes the same arguments.

    `score_threshold`, for those who want one number, becomes that of all classes together.
    """
    pooled, by_class = class_thresholds(truth, results, category_ids, precision)
    return replace(info, score_threshold=min(pooled, 1.0), class_thresholds=by_class, class_precision=precision)


def class_thresholds(
    truth: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int | None],
    precision: float,
    support: float = 10.0,
) -> tuple[float, tuple[float, ...]]:
    """The lowest score from which on the share of right detections is at least `precision`: over all, and by class.

    Detections that match no object and lie in a crowd region of their class (half of their box or more) are neither
    right nor wrong.

    Args:
        truth: a COCO file, as its path or its content.
        results: COCO results with boxes, down to scores well below any useful threshold.
        category_ids: id in `truth` of labels 1, 2, ...; None for a class that the file does not have.
        precision: above 0, up to 1.
        support: weight of all classes' share of right ones in that of a class, in detections, 0 or more.

    Returns:
        The threshold of all classes together, and one of each label. Where no score is enough, the float32 just above
        the best score that was seen (just above 1 where none was). A class without detections gets the threshold of
        all; one of which no score is enough never less than that, since a low best score, which a rare class may well
        have, says nothing about the scores above it.

    Raises:
        ValueError: broken truth or results, or numbers out of range.
    """
    if not 0.0 < precision <= 1.0:
        raise ValueError(f"a precision must be above 0 and at most 1, got {precision}")
    if not support >= 0.0:
        raise ValueError(f"support must be 0 or more, got {support}")
    counted = _right_and_wrong(truth, results)
    scores = np.array([score for _, score, _ in counted])  # [n]
    right = np.array([is_right for _, _, is_right in counted], dtype=bool)  # [n]
    classes = np.array([category_id for category_id, _, _ in counted], dtype=np.int64)  # [n]
    everything = _Curve(scores, right)
    pooled = _lowest(everything.scores, everything.right / everything.found, precision)
    if pooled is None:
        pooled = everything.just_above
    by_class = []
    for category_id in category_ids:
        own = np.zeros(len(classes), dtype=bool) if category_id is None else classes == category_id
        if not own.any():
            by_class.append(pooled)
            continue
        curve = _Curve(scores[own], right[own])
        overall = everything.share_at(curve.scores)
        lowest = _lowest(curve.scores, (curve.right + support * overall) / (curve.found + support), precision)
        by_class.append(max(curve.just_above, pooled) if lowest is None else lowest)
    return pooled, tuple(by_class)


class _Curve:
    """Each score that occurs, falling, with how many detections score at least that, and how many of them are right."""

    def __init__(self, scores: NDArray[np.float64], right: NDArray[np.bool_]) -> None:
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])  # of each score
        self.scores = ordered[last]
        self.found = last + 1
        self.right = np.cumsum(right[order])[last]

    @property
    def just_above(self) -> float:
        """The float32 above all of these scores; they are float32, and anything nearer would be the best one itself."""
        best = np.float32(self.scores[0]) if len(self.scores) else np.float32(1)
        return float(np.nextafter(best, np.float32(np.inf)))

    def share_at(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of right ones at or above each of these scores, all of which occur here."""
        place = np.searchsorted(-self.scores, -scores)
        return self.right[place] / self.found[place]


def _lowest(scores: NDArray[np.float64], shares: NDArray[np.float64], precision: float) -> float | None:
    enough = scores[shares >= precision - _ROUNDING]
    return float(enough.min()) if len(enough) else None


def _right_and_wrong(
    truth: Mapping[str, Any] | str | Path, results: Sequence[Mapping[str, Any]]
) -> list[tuple[int, float, bool]]:
    """Category id, score and whether it is right, of every detection that is either right or wrong."""
    annotations = read_ground_truth(truth, with_masks=False)
    found, _ = read_results(results, annotations)
    objects: dict[Any, list[Instance]] = defaultdict(list)
    detections: dict[Any, list[Instance]] = defaultdict(list)
    for one in annotations.instances:
        objects[one.image_id, one.category_id].append(one)
    for one in found:
        detections[one.image_id, one.category_id].append(one)
    counted = []
    for (image_id, category_id), group in detections.items():
        ordered = sorted(group, key=lambda one: -one.score)
        for one, verdict in zip(ordered, _verdicts(ordered, objects[image_id, category_id]), strict=True):
            if verdict is not None:
                counted.append((category_id, one.score, verdict))
    return counted


def _verdicts(detections: Sequence[Instance], objects: Sequence[Instance]) -> list[bool | None]:
    """Of one image and class, detections in falling score: right, wrong, or None where they lie in a crowd region."""
    if not objects:
        return [False] * len(detections)
    crowd = np.array([one.crowd for one in objects])  # [g]
    # [d, g]; the overlap with a crowd region is the share of the detection's box that lies in it
    overlaps = coco_mask.iou([[*one.box] for one in detections], [[*one.box] for one in objects], crowd.tolist())
    is_free = ~crowd
    verdicts: list[bool | None] = []
    for row in np.asarray(overlaps):
        candidates = np.where(is_free, row, -1.0)
        best = len(candidates) - 1 - int(np.argmax(candidates[::-1]))  # the last of equals, as COCO has it
        if candidates[best] >= _IOU:
            is_free[best] = False
            verdicts.append(True)
        else:
            verdicts.append(None if (row[crowd] >= _IOU).any() else False)
    return verdicts
