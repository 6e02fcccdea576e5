"""A network over the pictures of a COCO set: its results, and their AP.

`dsg eval` uses `results_of` too, so AP during training and afterwards is of the same pictures and numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from torch import nn

from dsg.model.data.pixels import read_picture
from dsg.model.data.records import Annotation, CocoData, ImageRecord
from dsg.model.network.checkpoint import Category, CheckpointInfo
from dsg.model.network.detections import with_counts
from dsg.model.network.predictor import Predictor, PreparedImage
from dsg.model.training import distributed
from dsg.model.training.evaluation import evaluate_results
from dsg.model.training.thresholds import with_class_thresholds

Results = list[dict[str, Any]]  # COCO results: image_id, category_id, bbox, score, segmentation


def results_of(
    predictor: Predictor,
    records: Sequence[ImageRecord],
    category_ids: Sequence[int | None],
    *,
    score_threshold: float,
    max_detections: int,
    batch: int = 4,
    threads: int = 4,
    on_picture: Callable[[], None] = lambda: None,
) -> Results:
    """COCO results of every picture.

    Pictures are read and resized in threads, put together by padded size (so that each gives what it would
    give alone), and their masks are encoded in threads while the next batch runs.

    Args:
        predictor: the network.
        records: pictures; each is read in the frame that its annotations use.
        category_ids: id of labels 1, 2, ... in the results; None: results of that label are left out
            (see `matching_ids`).
        score_threshold: lowest score that is kept, 0 to 1.
        max_detections: most results of a picture, up to the checkpoint's cap.
        batch: pictures that go through the network at once.
        threads: for reading and encoding.
        on_picture: called after each picture is done, for a progress bar.

    Raises:
        DataError: a picture cannot be read; one line that names the file.
    """
    encoded: list[Future[Results]] = []
    kept = [0 if one is None else one for one in category_ids]
    dropped = {label for label, one in enumerate(category_ids, start=1) if one is None}

    def encode(record: ImageRecord, found: Any) -> Results:
        results = found.to_coco(record.id, kept)
        return [one for one, label in zip(results, found.labels.tolist(), strict=True) if label not in dropped]

    def run(bucket: list[tuple[ImageRecord, PreparedImage]]) -> None:
        detections = predictor.detect([prepared for _, prepared in bucket])
        detections = [found.select(score_threshold, max_detections) for found in detections]
        if any(getattr(found.mask_probs, "is_cuda", False) for found in detections):
            detections = with_counts(detections)  # there it takes a fraction of what threads take here
        for (record, _), found in zip(bucket, detections, strict=True):
            encoded.append(pool.submit(encode, record, found.to("cpu")))
            on_picture()

    # Pictures of one size follow each other, so that buckets fill up and few are left half full.
    ordered = sorted(records, key=lambda record: record.size)
    buckets: dict[tuple[int, int], list[tuple[ImageRecord, PreparedImage]]] = defaultdict(list)
    with ThreadPoolExecutor(threads) as pool:
        for record, prepared in _prepared(predictor, ordered, pool, ahead=2 * batch + threads):
            bucket = buckets[prepared.padded_size]
            bucket.append((record, prepared))
            if len(bucket) == batch:
                run(buckets.pop(prepared.padded_size))
        for bucket in buckets.values():
            run(bucket)
        return [result for future in encoded for result in future.result()]


def matching_ids(own: Sequence[Category], wanted: Sequence[Category]) -> list[int | None]:
    """The id that each of a network's categories has in another file, by name; None where that file lacks it.

    Raises:
        ValueError: the two have no name in common, so that every detection would be wrong.
    """
    by_name = {category.name: category.id for category in wanted}
    ids = [by_name.get(category.name) for category in own]
    if all(one is None for one in ids):
        raise ValueError(
            f"the network knows {_some(own)}, the annotations {_some(wanted)}: no name in common;"
            " rename the categories in the annotations"
        )
    return ids


def ground_truth(data: CocoData) -> dict[str, Any]:
    """A `CocoData` as the COCO document that an evaluator reads.

    Masks come as RLE, areas are those of the masks (of the boxes where there is no mask), ids of annotations
    are 1, 2, ... since those of joined files may repeat.
    """
    annotations: list[dict[str, Any]] = []
    for record in data.records:
        for one in record.annotations:
            annotations.append(_coco_annotation(len(annotations) + 1, one, record, data.categories))
    return {
        "images": [
            {"id": record.id, "file_name": record.path.name, "height": record.height, "width": record.width}
            for record in data.records
        ],
        "annotations": annotations,
        "categories": [
            {"id": category.id, "name": category.name, "supercategory": category.supercategory}
            for category in data.categories
        ],
    }


class Validation:
    """AP of a network on a fixed set, on all processes together.

    Args:
        data: the pictures.
        info: of the network: how pictures are resized, what labels mean, which scores count.
        ranks: this process among all; each predicts a share, the first one evaluates.
        batch, threads: as in `results_of`.
        max_detections: detections of a picture that count; 0: the larger of 100 and the fullest picture's
            objects.
        precision: that the thresholds of the classes are chosen for, 0 to 1; 0: they are not chosen.

    Raises:
        ValueError: network and data have no category name in common.
    """

    def __init__(
        self,
        data: CocoData,
        info: CheckpointInfo,
        ranks: distributed.Ranks,
        *,
        batch: int,
        threads: int,
        max_detections: int,
        precision: float = 0.0,
    ) -> None:
        self.data = data
        objects = (sum(not one.iscrowd for one in record.annotations) for record in data.records)
        self.fullest = max(objects, default=0)
        self.max_detections = max_detections or max(100, self.fullest)
        self.info = info
        """Of the network, with the thresholds that the last validation chose (on the first process alone)."""
        self._precision = precision
        self._category_ids = matching_ids(info.categories, data.categories)
        self._truth = ground_truth(data)
        self._ranks = ranks
        self._batch = batch
        self._threads = threads

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """AP and AP50 of boxes and masks, fractions of 1; "AP" is that of masks where there are any, else of
        boxes.

        Args:
            model: in eval mode.
        """
        part = results_of(
            Predictor(model, self.info),  # a recipe's own network will do, too
            distributed.share_of(self.data.records, self._ranks),
            self._category_ids,
            score_threshold=self.info.eval_score_threshold,
            max_detections=min(self.max_detections, self.info.max_detections),
            batch=self._batch,
            threads=self._threads,
        )
        results = distributed.gather_lists(part)
        metrics = self._evaluate(results) if self._ranks.is_main else None
        return distributed.from_main(metrics)

    def _evaluate(self, results: Results) -> dict[str, float]:
        evaluation = evaluate_results(self._truth, results, self.max_detections)
        if self._precision:
            self.info = with_class_thresholds(self.info, self._truth, results, self._category_ids, self._precision)
        metrics: dict[str, float] = {}
        for kind, found in (("segm", evaluation.segm or {}), ("bbox", evaluation.bbox)):
            for name in ("AP", "AP50"):
                if (value := found.get(name)) is not None:
                    metrics[f"{kind}/{name}"] = value
        return {"AP": metrics.get("segm/AP", metrics.get("bbox/AP", 0.0)), **metrics}


def _prepared(
    predictor: Predictor, records: Sequence[ImageRecord], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[ImageRecord, PreparedImage]]:
    """Pictures in order, read in the pool at most `ahead` before they are asked for."""

    def prepare(record: ImageRecord) -> PreparedImage:
        # As an array: the frame is settled here, and an orientation tag must not turn it once more.
        return predictor.prepare(np.array(read_picture(record.path, record.size)))

    waiting = iter(records)
    futures = [(record, pool.submit(prepare, record)) for record in islice(waiting, ahead)]
    while futures:
        record, future = futures.pop(0)
        yield record, future.result()
        futures += [(following, pool.submit(prepare, following)) for following in islice(waiting, 1)]


def _coco_annotation(
    number: int, one: Annotation, record: ImageRecord, categories: Sequence[Category]
) -> dict[str, Any]:
    x1, y1, x2, y2 = one.box
    entry: dict[str, Any] = {
        "id": number,
        "image_id": record.id,
        "category_id": categories[one.category_id - 1].id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": int(one.iscrowd),
        "segmentation": [],
    }
    if one.segmentation is not None:
        rle = _rle(one.segmentation, record.height, record.width)
        entry |= {"segmentation": rle, "area": float(coco_mask.area(rle))}
    return entry


def _rle(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes):
        rle = segmentation
    else:
        parts = coco_mask.frPyObjects(segmentation, height, width)
        rle = coco_mask.merge(parts) if isinstance(parts, list) else parts
    counts = rle["counts"]
    # text, so that the document can be written as JSON
    return {**rle, "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _some(categories: Sequence[Category]) -> str:
    names = [category.name for category in categories]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
