"""Detections -> one COCO document, as bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from dsg.model.network.detections import with_counts
from dsg.service.polygons import polygons
from dsg.service.query import MaskFormat, Wanted

if TYPE_CHECKING:
    from dsg.model.network.checkpoint import CheckpointInfo
    from dsg.model.network.detections import Detections


@dataclass(frozen=True)
class Answered:
    """One picture of a request with what was found in it."""

    name: str
    """The file's name, as the client calls it."""
    detections: "Detections"


def select(detections: "Detections", wanted: Wanted) -> "Detections":
    """What of a picture's detections a request wants: its categories first, then threshold and number."""
    if wanted.labels is not None:
        labels = wanted.labels
        detections = detections.rows([row for row, own in enumerate(detections.labels.tolist()) if own in labels])
    return detections.select(wanted.score_threshold, wanted.max_detections)


def coco_document(
    answered: Sequence[Answered], wanted: Wanted, info: "CheckpointInfo", model_name: str
) -> dict[str, Any]:
    """The COCO document of a request: `pycocotools.coco.COCO` loads it, and `loadRes` takes its annotations.

    Images and annotations are numbered from 1 in their order. `bbox` is the box that was detected, `area` the
    number of pixels of the mask.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(answered, 1):
        detections = select(picture.detections, wanted)
        if detections.areas is None:
            (detections,) = with_counts([detections])
        assert detections.areas is not None
        height, width = detections.image_size
        images.append({"id": image_id, "file_name": picture.name, "width": width, "height": height})
        results = detections.to_coco(image_id, info.category_ids)
        for number, (result, area) in enumerate(zip(results, detections.areas, strict=True), len(annotations) + 1):
            segmentation = _segmentation(result["segmentation"], wanted.mask_format)
            annotations.append({"id": number, **result, "area": area, "segmentation": segmentation, "iscrowd": 0})
    return {
        "info": {
            "description": "instances found by a detector",
            "model": model_name,
            "version": info.version,
            "hash": info.hash,
            "licence": info.licence,
        },
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": category.id, "name": category.name, "supercategory": category.supercategory}
            for category in info.categories
        ],
    }


def to_json(document: dict[str, Any]) -> bytes:
    """Bytes of a document."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _segmentation(rle: dict[str, Any], mask_format: MaskFormat) -> dict[str, Any] | list[list[int]]:
    if mask_format == "polygon":
        # pycocotools cannot draw a list of no polygons: a mask without a pixel stays RLE.
        return polygons(rle) or rle
    return rle if mask_format == "rle" else []
