"""Whether an exported file gives what the model gives: matched detections, and the tolerances that they must keep.

B images, K detections of an image, m side of a mask.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
"""The arrays of `contract.OUTPUTS`."""

_SURE_SCORE = 0.05
_FEWEST_COMPARED = 20  # of a picture: where few are sure, the best of the others stand in


@dataclass(frozen=True)
class Tolerance:
    """How far a detection may move and still be the same."""

    box: float
    """Pixels, the furthest of four sides."""
    score: float
    mask_iou: float
    """Least overlap of the two masks, cut at 0.5."""
    matched: float
    """Share of the detections that must have a partner."""


FLOAT32 = Tolerance(box=1e-2, score=1e-4, mask_iou=0.999, matched=0.99)
FLOAT16 = Tolerance(box=2.0, score=2e-2, mask_iou=0.9, matched=0.99)
"""Half precision moves boxes by tenths of pixels, and may swap which of two overlapping boxes stays. `matched` is a
share of what the model itself keeps when it computes in half precision."""


@dataclass(frozen=True)
class Comparison:
    """What became of the model's detections in a file's results."""

    compared: int
    matched: int
    box: float
    """Largest difference of a matched box, pixels."""
    score: float
    mask: float
    """Largest difference of a matched mask's probability."""

    def __add__(self, other: "Comparison") -> "Comparison":
        worst = (max(getattr(self, name), getattr(other, name)) for name in ("box", "score", "mask"))
        return Comparison(self.compared + other.compared, self.matched + other.matched, *worst)

    @property
    def share(self) -> float:
        """Matched of all compared, 1 where there was nothing to compare."""
        return self.matched / self.compared if self.compared else 1.0

    def __str__(self) -> str:
        return (
            f"{self.matched} of {self.compared} detections equal, boxes within {self.box:.1e} px, "
            f"scores {self.score:.1e}, masks {self.mask:.1e}"
        )


NOTHING = Comparison(0, 0, 0.0, 0.0, 0.0)


def compare(expected: Arrays, found: Arrays, tolerance: Tolerance) -> Comparison:
    """Match detections one to one, image by image, best score first.

    Compared are all that score above 0.05; where a picture has fewer than 20 of them, its best 20.

    Raises:
        ValueError: the arrays differ in shape or type, or hold numbers that are not finite.
    """
    for name, array in expected.items():
        other = found[name]
        if other.shape != array.shape or other.dtype != array.dtype:
            raise ValueError(f"{name} is {other.dtype} {list(other.shape)}, not {array.dtype} {list(array.shape)}")
        if not np.isfinite(other).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    total = NOTHING
    for image in range(len(expected["valid"])):
        wanted_rows = {name: array[image] for name, array in expected.items()}
        found_rows = {name: array[image] for name, array in found.items()}
        total = total + _compare_image(wanted_rows, found_rows, tolerance)
    return total


def _compare_image(expected: Arrays, found: Arrays, tolerance: Tolerance) -> Comparison:
    rows = np.flatnonzero(expected["valid"])
    sure = int((expected["scores"][rows] > _SURE_SCORE).sum())
    rows = rows[: max(sure, _FEWEST_COMPARED)]  # they fall in score
    free = found["valid"].copy()
    matched, box, score, mask = 0, 0.0, 0.0, 0.0
    for row in rows.tolist():
        for partner in _nearest(expected, row, found, free, tolerance):
            moved = np.abs(expected["boxes"][row] - found["boxes"][partner]).max()
            changed = np.abs(expected["mask_probs"][row] - found["mask_probs"][partner]).max()
            rescored = abs(expected["scores"][row] - found["scores"][partner])
            free[partner] = False
            matched += 1
            box, score, mask = max(box, float(moved)), max(score, float(rescored)), max(mask, float(changed))
    return Comparison(len(rows), matched, box, score, mask)


def _nearest(expected: Arrays, row: int, found: Arrays, free: NDArray[np.bool_], tolerance: Tolerance) -> Iterator[int]:
    """The one free row of `found` that is the same detection, if there is one: of several the nearest."""
    moved = np.abs(found["boxes"] - expected["boxes"][row]).max(axis=1)  # [K]
    close = free & (found["labels"] == expected["labels"][row]) & (moved <= tolerance.box)
    close &= np.abs(found["scores"] - expected["scores"][row]) <= tolerance.score
    for partner in sorted(np.flatnonzero(close).tolist(), key=lambda index: moved[index]):
        if _mask_iou(expected["mask_probs"][row], found["mask_probs"][partner]) >= tolerance.mask_iou:
            yield partner
            return


def _mask_iou(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Overlap of two masks [m, m]; cells within rounding of the threshold count as equal."""
    first, second = one >= 0.5, other >= 0.5
    differ = (first != second) & (np.abs(one - other) > 1e-3)
    union = int((first | second).sum())
    return 1.0 - int(differ.sum()) / union if union else 1.0
