"""Masks of several networks of the same crowded places, side by side.

Masks alone, no photo: a comparison can be shown whatever the licence of the pictures. h, w: size of a picture.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dsg.model.data.records import CocoData, ImageRecord
from dsg.model.network.predictor import load
from dsg.model.training.sources import read_sets
from dsg.model.training.validate import Results, ground_truth, matching_ids, results_of

_SIDE = 320
"""Pixels of a panel's longer side."""
_TITLE = 18
_GAP = 6


def most_crowded(data: CocoData, count: int) -> list[ImageRecord]:
    """The `count` pictures with the most objects, fullest first."""
    return sorted(data.records, key=lambda record: -len(record.annotations))[:count]


def side_by_side(data: CocoData, results: Mapping[str, Results], records: Sequence[ImageRecord], out: Path) -> None:
    """A sheet with a row for each picture: what is right, then each network's masks.

    Args:
        data: the pictures' set, with what is right.
        results: title -> COCO results with masks, already without those that score too little.
        records: pictures to show.
        out: PNG file to write.

    Raises:
        OSError: the file cannot be written.
    """
    columns: dict[str, Sequence[Mapping[str, Any]]] = {"annotated": ground_truth(data)["annotations"], **results}
    rows = [
        [_panel(entries, record, f"{title}: {_count(entries, record)}") for title, entries in columns.items()]
        for record in records
    ]
    width = max(sum(panel.width + _GAP for panel in row) for row in rows)
    height = sum(row[0].height + _GAP for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        left = 0
        for panel in row:
            sheet.paste(panel, (left, top))
            left += panel.width + _GAP
        top += row[0].height + _GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def draw_runs(
    weights: Mapping[str, Path],
    files: Sequence[Path],
    folders: Sequence[Path],
    out: Path,
    device: str,
    *,
    count: int = 4,
    score_threshold: float = 0.5,
) -> None:
    """`side_by_side` of the fullest pictures by several checkpoints.

    Args:
        weights: title -> checkpoint.
        files, folders: COCO files, and where their pictures are, as in `dsg train --val`.
        count: pictures.
        score_threshold: lowest score that is drawn, 0 to 1.
    """
    _, data = read_sets(files, folders, files, folders)
    records = most_crowded(data, count)
    results = {}
    for title, path in weights.items():
        predictor = load(path, device)
        results[title] = results_of(
            predictor,
            records,
            matching_ids(predictor.info.categories, data.categories),
            score_threshold=score_threshold,
            max_detections=predictor.info.max_detections,
        )
    side_by_side(data, results, records, out)


def _count(entries: Sequence[Mapping[str, Any]], record: ImageRecord) -> int:
    return Counter(entry["image_id"] for entry in entries)[record.id]


def _panel(entries: Sequence[Mapping[str, Any]], record: ImageRecord, title: str) -> Image.Image:
    """One picture's masks in colours on black, smaller ones above, with a line between those that touch."""
    masks = [
        coco_mask.decode(entry["segmentation"]).astype(bool)  # [h, w]
        for entry in entries
        if entry["image_id"] == record.id and entry["segmentation"]
    ]
    pixels = np.zeros((record.height, record.width, 3), np.uint8)
    rng = np.random.default_rng(0)
    for mask in sorted(masks, key=lambda mask: -int(mask.sum())):
        pixels[mask] = rng.integers(70, 255, 3)
        pixels[_edge(mask)] = 0
    scale = _SIDE / max(record.height, record.width)
    size = (round(record.width * scale), round(record.height * scale))
    panel = Image.new("RGB", (size[0], size[1] + _TITLE), "white")
    ImageDraw.Draw(panel).text((2, 3), title, fill="black")
    panel.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), (0, _TITLE))
    return panel


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask [h, w] with a neighbour, above, below or beside, that is not of it."""
    inside = np.pad(mask, 1)
    kept = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return mask & ~kept
