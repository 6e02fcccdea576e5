"""What a COCO file says, as plain values: the records that every other file of this room reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg.model.network.checkpoint import Category


class DataError(ValueError):
    """Data that cannot be used. One line: the file, the image or annotation id, what is wrong, what to do."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object, or one crowd region."""

    box: tuple[float, float, float, float]
    """xyxy in the picture's pixels, clipped to it, with an area above 0."""
    category_id: int
    """Label, 1 to the number of categories: categories[category_id - 1]. Not the file's id."""
    segmentation: list[list[float]] | dict[str, Any] | None
    """Polygons of at least 3 points, each [x0, y0, x1, y1, ...]; or RLE, {"size": [height, width], "counts":
    list, str or bytes}; None: no mask is known."""
    iscrowd: bool
    """A region with many objects: neither a positive nor a negative."""
    id: int
    """As in its file."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture and what is known to be in it."""

    id: int
    """Unique within a `CocoData`; as in its file, unless `join` had to give it another."""
    path: Path
    height: int
    """Pixels, in the frame that the annotations use."""
    width: int
    annotations: tuple[Annotation, ...]
    """Empty for a picture that is known to show nothing."""
    licence: str = ""
    """Name of the picture's licence; empty where the file does not say."""
    file_id: int | None = None
    """Id in its file, where `id` is not it."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width


@dataclass(frozen=True, slots=True)
class CocoData:
    """Pictures with their objects, and the categories that labels point to."""

    records: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    """Label l is categories[l - 1]; ids and order as in the file."""
