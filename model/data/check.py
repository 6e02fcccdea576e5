"""What `dsg data check` tells: everything that is wrong with a COCO file and its pictures, and what is in
it."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsg.model.data.parse import load_json, parse
from dsg.model.data.pixels import read_picture
from dsg.model.data.records import CocoData, DataError, ImageRecord


@dataclass(frozen=True)
class Report:
    """The findings about one COCO file. Counts are of what training would use."""

    path: Path
    """The JSON file."""
    images: int
    empty_images: int
    """Images without any object or crowd region: negatives."""
    objects: int
    """Annotations that are no crowd regions."""
    with_mask: int
    """Objects with a mask; the others train the boxes only."""
    crowd_regions: int
    fullest_image: int
    """Objects in the image that has most: what `max_detections` must reach."""
    smallest: tuple[int, int]
    """(height, width) of the image with the fewest pixels; (0, 0) without images."""
    largest: tuple[int, int]
    """(height, width) of the image with the most pixels; (0, 0) without images."""
    per_category: tuple[tuple[str, int], ...]
    """Objects of each category, in the file's order."""
    errors: tuple[str, ...]
    """What training refuses, one line each."""
    warnings: tuple[str, ...]
    """What training leaves out or puts right, one line each."""

    @property
    def ok(self) -> bool:
        """Whether training can use the file as it is."""
        return not self.errors

    @property
    def problems(self) -> tuple[str, ...]:
        """All lines: errors, then warnings."""
        return self.errors + self.warnings

    def summary(self) -> list[str]:
        """The counts, as lines for a person."""
        small, large = (" x ".join(map(str, size)) for size in (self.smallest, self.largest))
        unused = [name for name, count in self.per_category if not count]
        counts = sorted(self.per_category, key=lambda item: -item[1])
        lines = [
            f"{self.path}: {self.images} images ({self.empty_images} without objects), "
            f"{self.objects} objects ({self.with_mask} with masks), {self.crowd_regions} crowd regions",
            f"sizes (height x width): {small} to {large}; most objects in one image: {self.fullest_image}",
            f"{len(self.per_category)} categories: " + ", ".join(f"{name} {n}" for name, n in counts if n),
        ]
        if unused:
            lines.append("categories without objects: " + ", ".join(unused))
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings")
        return lines


class _Collect:
    """Findings of a check: all of them."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def error(self, line: str) -> None:
        self.errors.append(line)

    def note(self, kind: str, line: str) -> None:
        self.warnings.append(line)


def check_file(
    json_path: str | Path,
    images_dir: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads a COCO file and decodes every picture of it.

    Args:
        json_path: a COCO instances file.
        images_dir: where `file_name` starts from; None: `images/` beside the file.
        on_progress: called with (pictures done, pictures in all) after each picture, from the calling thread.

    Raises:
        DataError: the file cannot be read as COCO JSON at all; all other trouble is in the report.
    """
    path = Path(json_path)
    findings = _Collect()
    directory = path.parent / "images" if images_dir is None else Path(images_dir)
    data = parse(path, load_json(path), directory, findings)
    if not data.records:
        findings.error(f"{path}: has no image that can be used; add the pictures under 'images'")
    elif not directory.is_dir():
        findings.error(f"{directory}: no such images directory; say where the pictures of {path} are")
    else:
        _check_pictures(path, data, findings, on_progress)
    return _report(path, data, findings)


def _check_pictures(
    path: Path, data: CocoData, findings: _Collect, on_progress: Callable[[int, int], None] | None
) -> None:
    total = len(data.records)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, trouble in enumerate(pool.map(_picture_trouble, data.records), start=1):
            if trouble:
                findings.error(f"{path}: image {data.records[done - 1].id}: {trouble}")
            if on_progress:
                on_progress(done, total)


def _picture_trouble(record: ImageRecord) -> str:
    try:
        read_picture(record.path, record.size)
    except DataError as error:
        return str(error)
    return ""


def _report(path: Path, data: CocoData, findings: _Collect) -> Report:
    objects = [[one for one in record.annotations if not one.iscrowd] for record in data.records]
    per_label = Counter(one.category_id for group in objects for one in group)
    sizes = sorted((record.size for record in data.records), key=lambda size: (size[0] * size[1], size))
    return Report(
        path=path,
        images=len(data.records),
        empty_images=sum(not record.annotations for record in data.records),
        objects=sum(map(len, objects)),
        with_mask=sum(one.segmentation is not None for group in objects for one in group),
        crowd_regions=sum(one.iscrowd for record in data.records for one in record.annotations),
        fullest_image=max(map(len, objects), default=0),
        smallest=sizes[0] if sizes else (0, 0),
        largest=sizes[-1] if sizes else (0, 0),
        per_category=tuple(
            (category.name, per_label[label]) for label, category in enumerate(data.categories, start=1)
        ),
        errors=tuple(findings.errors),
        warnings=tuple(findings.warnings),
    )
