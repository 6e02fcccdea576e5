"""What the fast path costs: AP in half precision and with fewer proposals, beside plain float32, and how many of the
detections stay what they were.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask

from dsg.bench.report import Row
from dsg.model.data.coco import read_coco
from dsg.model.data.records import CocoData
from dsg.model.network.predictor import Precision, Predictor, load
from dsg.model.training.evaluation import Evaluation, evaluate_results, max_objects_in_an_image
from dsg.model.training.validate import Results, matching_ids, results_of

_SHOWN_ABOVE = 0.3  # score of float32's detections that are looked for
_SAME_FROM = 0.95  # mask IoU
_PROPOSALS = 300


def run(
    model: str,
    annotations: Path,
    images: Path | None,
    device: torch.device,
    precision: Precision = "auto",
    proposals: Sequence[int] = (),
    on_case: Callable[[str], None] = lambda case: None,
    on_picture: Callable[[int, int], None] = lambda done, of: None,
) -> list[Row]:
    """Rows of the fast path with the checkpoint's proposals, then with each other number of them; baseline float32.

    Args:
        model: a name of `dsg models`, or a checkpoint.
        annotations, images: COCO file, and the folder of its pictures; None is images/ beside the file.
        device: CPU or CUDA.
        precision: of the fast path; "auto" is float16 on a GPU, and float32 on a CPU.
        proposals: numbers of them; none given: 300 where the network has mask proposals, and more of them.
        on_case: told each case before it is measured.
        on_picture: pictures done, and of how many, in the present case.

    Raises:
        DataError: data that cannot be used; ValueError: no category in common, an unknown precision.
    """
    data = read_coco(annotations, images)
    most = max(100, max_objects_in_an_image(annotations))

    def results(predictor: Predictor) -> tuple[Results, Evaluation]:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            on_picture(done, len(data.records))

        found = _results(predictor, data, most, count)
        return found, evaluate_results(annotations, found, most)

    plain = load(model, device, "float32")
    name, config = plain.info.name, plain.model.config
    on_case(f"{name}, float32")
    reference = results(plain)
    del plain
    numbers = list(proposals) or ([_PROPOSALS] if config.mrpn and config.proposals > _PROPOSALS else [])
    rows = []
    for number in (None, *numbers):
        fast = load(model, device, precision, number)
        computed = str(fast.model.dtype).removeprefix("torch.")
        case = f"{name}, {computed}, {number or config.proposals} proposals"
        on_case(case)
        rows += _rows(case, f"baseline float32, {config.proposals} proposals", results(fast), reference)
    return rows


def matched_share(reference: Results, found: Results) -> tuple[float, int]:
    """How many of one path's detections the other finds, too.

    One to one, best score first: a detection takes the free one of the same picture and category whose mask overlaps
    it most, if their IoU is at least .95.

    Args:
        reference: COCO results with masks; those that score above .3 are looked for.
        found: the same of the other path, of any score.

    Returns:
        Share in 0..1 (1 where there is nothing to look for), and of how many.
    """
    free: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        free[one["image_id"], one["category_id"]].append(one["segmentation"])
    wanted: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for one in sorted(reference, key=lambda one: one["score"], reverse=True):
        if one["score"] > _SHOWN_ABOVE:
            wanted[one["image_id"], one["category_id"]].append(one["segmentation"])
    matched = 0
    for key, masks in wanted.items():
        if not free[key]:
            continue
        overlaps = np.array(coco_mask.iou(masks, free[key], [0] * len(free[key])))  # [wanted, free]
        for row in overlaps:
            best = int(row.argmax())
            if row[best] >= _SAME_FROM:
                matched += 1
                overlaps[:, best] = 0
    count = sum(len(masks) for masks in wanted.values())
    return (matched / count if count else 1.0), count


def _results(predictor: Predictor, data: CocoData, most: int, on_picture: Callable[[], None]) -> Results:
    """As `dsg eval` has them."""
    return results_of(
        predictor,
        data.records,
        matching_ids(predictor.info.categories, data.categories),
        score_threshold=predictor.info.eval_score_threshold,
        max_detections=min(most, predictor.info.max_detections),
        on_picture=on_picture,
    )


def _rows(case: str, baseline: str, fast: tuple[Results, Evaluation], plain: tuple[Results, Evaluation]) -> list[Row]:
    rows = []
    for what, own, other in (
        ("box", fast[1].bbox, plain[1].bbox),
        ("mask", fast[1].segm or {}, plain[1].segm or {}),
    ):
        if (value := own.get("AP")) is not None and (before := other.get("AP")) is not None:
            rows.append(_percent(f"{case}, {what} AP; {baseline}", "AP", value, before))
    share, count = matched_share(plain[0], fast[0])
    detections = f"{count} detections above {_SHOWN_ABOVE}"
    rows.append(
        _percent(f"{case}, found again at mask IoU {_SAME_FROM}; {baseline}, its {detections}", "%", share, 1.0)
    )
    return rows


def _percent(case: str, unit: str, share: float, baseline: float) -> Row:
    ratio = share / baseline if baseline else 1.0
    return Row(case, round(100 * share, 3), unit, round(100 * baseline, 3), round(ratio, 4))
