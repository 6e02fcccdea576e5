"""All that decides a trained network's predictions beside its tensors. Needs no torch: exported files carry it too."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

JUST_ABOVE_ONE = 1.0 + 2.0**-23
"""The float32 after 1: a threshold that no score reaches."""


@dataclass(frozen=True)
class Category:
    """One class, as the file it was trained on names it."""

    id: int
    """Category id of every output; never the label's index."""
    name: str
    supercategory: str = ""


@dataclass(frozen=True)
class Resize:
    """How pictures are scaled before the network sees them: keeping their shape, until a bound is met."""

    short_side: int
    """Pixels that the short side is scaled to ..."""
    long_side: int
    """... unless the long side would then exceed this many pixels."""
    interpolation: str = "bilinear"
    antialias: bool = True
    """Low-pass before shrinking; torchvision's detectors do not."""
    rounding: str = "down"
    """Fractions of a pixel: cut off (down), or to the nearest whole one (nearest; detectron2, mmdetection)."""

    def __post_init__(self) -> None:
        if self.interpolation != "bilinear":
            raise ValueError(f"resize interpolation must be 'bilinear', got {self.interpolation!r}")
        if self.rounding not in ("down", "nearest"):
            raise ValueError(f"resize rounding must be 'down' or 'nearest', got {self.rounding!r}")
        if not 0 < self.short_side <= self.long_side:
            raise ValueError(f"resize needs 0 < short_side <= long_side, got {self.short_side} and {self.long_side}")


@dataclass(frozen=True)
class CheckpointInfo:
    """All that decides a checkpoint's predictions beside its tensors, and where it comes from."""

    name: str
    preset: str
    overrides: dict[str, Any]
    """Fields of `DetectorConfig` that differ from the preset, `num_classes` excepted (it is len(categories))."""
    categories: tuple[Category, ...]
    """Label l is categories[l - 1]."""
    resize: Resize
    score_threshold: float
    """Default of `predict` and `/segment` for all classes where `class_thresholds` is empty, 0..1."""
    eval_score_threshold: float = 0.001
    """What evaluation uses (paper, section 4.1), 0..1."""
    max_detections: int = 100
    """Default and cap of detections a picture."""
    class_thresholds: tuple[float, ...] = ()
    """Default of `predict` and `/segment` for labels 1, 2, ...: 0..1, or just above 1 for a class that is not shown
    unless asked for. Empty: `score_threshold` for all."""
    class_precision: float = 0.0
    """Share of right detections that `class_thresholds` were chosen for, 0..1; 0 where nothing was chosen."""
    paste: str = "box"
    """How masks come into the picture: box, as torchvision does it, or grid, at pixel centres; see `dsg.ops.masks`."""
    licence: str = ""
    """Of the weights, with what their training data demands."""
    version: str = ""
    """Of the package that wrote the file."""
    hash: str = ""
    """SHA-256 over names, types, shapes and bytes of the tensors."""
    notes: dict[str, str] = field(default_factory=dict)
    """Free text: data, recipe, iterations, AP."""

    def __post_init__(self) -> None:
        if self.class_thresholds and len(self.class_thresholds) != len(self.categories):
            raise ValueError(
                f"class_thresholds must be one for each of {len(self.categories)} categories,"
                f" got {len(self.class_thresholds)}"
            )
        for value in self.class_thresholds:
            if not _is_between(value, JUST_ABOVE_ONE):
                raise ValueError(f"class_thresholds must be numbers in 0..1, got {value!r}")
        if not _is_between(self.class_precision, 1.0):
            raise ValueError(f"class_precision must be a number in 0..1, got {self.class_precision!r}")

    @property
    def default_threshold(self) -> float | tuple[float, ...]:
        """Lowest score that is shown where nothing else is asked for: one for all classes, or one of each label."""
        return self.class_thresholds or self.score_threshold

    @property
    def threshold_in_words(self) -> str:
        """The default threshold for people, such as "0.4" or "0.31 to 0.72 by class (chosen for 80% right ones)"."""
        if not self.class_thresholds:
            return f"{self.score_threshold:g}"
        lowest, highest = min(self.class_thresholds), max(self.class_thresholds)
        return f"{lowest:.2f} to {highest:.2f} by class (chosen for {self.class_precision:.0%} right ones)"

    @property
    def category_ids(self) -> list[int]:
        """Category id of labels 1, 2, ..."""
        return [category.id for category in self.categories]

    @property
    def category_names(self) -> list[str]:
        """Name of labels 1, 2, ..."""
        return [category.name for category in self.categories]

    def to_json(self) -> str:
        """One line of JSON, keys in the order of the fields."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointInfo":
        """What `to_json` wrote. Raises KeyError, TypeError or ValueError when it is something else."""
        document = json.loads(text)
        document["categories"] = tuple(Category(**category) for category in document["categories"])
        document["resize"] = Resize(**document["resize"])
        document["class_thresholds"] = tuple(document.get("class_thresholds", ()))  # older files have none
        return cls(**document)


def _is_between(value: object, highest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= highest
