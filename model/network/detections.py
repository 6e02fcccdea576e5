"""What a network found in one picture, and its way into COCO results.

The fields are torch tensors, or NumPy arrays where an exported file runs without torch; all here works with either.

Letters: `n` detections, `m` side of a mask, `H, W` size of the original picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dsg.ops.rle import rle_areas

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_TENSORS = ("boxes", "scores", "labels", "mask_probs")


def lowest_of(score_threshold: float | Sequence[float]) -> float:
    """The lowest score that any class's threshold lets through, for `Predictor.detect`; at most 1."""
    return min(1.0, *score_threshold) if isinstance(score_threshold, Sequence) else score_threshold


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one picture, best first.

    Raises:
        TypeError, ValueError: fields of the wrong kind, or whose shapes do not go together.
    """

    boxes: Tensor
    """float32 [n, 4] as (x1, y1, x2, y2) in pixels of the original picture, EXIF orientation applied."""

    scores: Tensor
    """float32 [n] in [0, 1], falling."""

    labels: Tensor
    """int64 [n] in 1..num_classes; 0 would be background and does not occur."""

    mask_probs: Tensor
    """float32 [n, m, m] in [0, 1]: the chance that each cell of a grid over the box is of the object."""

    image_size: tuple[int, int]
    """(H, W) of the original picture in pixels."""

    paste: str = "box"
    """How masks come into the picture: "box" or "grid", see `dsg.ops.masks`."""

    counts: tuple[str, ...] | None = None
    """COCO's compressed counts of the n masks where they are made already, see `with_counts`."""

    areas: tuple[int, ...] | None = None
    """How many pixels of the n masks are set, where that is known already."""

    def __post_init__(self) -> None:
        for name in ("boxes", "scores", "mask_probs"):
            if not _is_floating(getattr(self, name)):
                raise TypeError(f"detections: {name} must be floating point, not {getattr(self, name).dtype}")
        if _is_floating(self.labels):
            raise TypeError(f"detections: labels must be int64, not {self.labels.dtype}")
        n, side = math.prod(self.scores.shape), self.mask_probs.shape[-1] if self.mask_probs.ndim else 0
        expected = {"scores": (n,), "boxes": (n, 4), "labels": (n,), "mask_probs": (n, side, side)}
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"detections: {name} must be {list(shape)}, not {list(found)}")
        for name, known in (("counts", self.counts), ("areas", self.areas)):
            if known is not None and len(known) != n:
                raise ValueError(f"detections: {name} must be of {n} masks, not {len(known)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"detections: image_size must be (height, width), not {tuple(self.image_size)}")

    def __len__(self) -> int:
        return len(self.scores)

    def masks(self) -> Tensor:
        """Full-size masks: bool [n, H, W], a pixel set where its probability is at least 0.5."""
        if isinstance(self.mask_probs, np.ndarray):
            from dsg.ops.array_masks import paste_arrays

            return paste_arrays(self.mask_probs, self.boxes, self.image_size, paste=self.paste)
        from dsg.ops.masks import paste_masks  # torch comes in only where it is used

        return paste_masks(self.mask_probs, self.boxes, self.image_size, paste=self.paste)

    def rle(self) -> list[dict[str, Any]]:
        """The masks as n COCO RLEs `{"size": [H, W], "counts": str}`, made without a full-size mask."""
        if self.counts is not None:
            return [{"size": list(self.image_size), "counts": text} for text in self.counts]
        if isinstance(self.mask_probs, np.ndarray):
            from dsg.ops.array_masks import encode_arrays

            return encode_arrays(self.mask_probs, self.boxes, self.image_size, paste=self.paste)
        from dsg.ops.masks import encode_masks  # torch comes in only where it is used

        return encode_masks(self.mask_probs, self.boxes, self.image_size, paste=self.paste)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """COCO results: one dict a detection, in plain Python numbers, nothing rounded.

        Args:
            image_id: goes into each result as it is.
            category_ids: `category_ids[label - 1]` is the id of a label in the training file.

        Returns:
            Dicts of `image_id`, `category_id`, `bbox` [x, y, w, h] in original pixels, `score`, and
            `segmentation` (compressed RLE), best first.

        Raises:
            ValueError: a label that has no category id.
        """
        labels = self.labels.tolist()
        for label in labels:
            if not 1 <= label <= len(category_ids):
                raise ValueError(
                    f"detections of image {image_id}: label {label} has no category id, "
                    f"there are {len(category_ids)}; pass one for each class of the network"
                )
        rows = zip(self.boxes.tolist(), self.scores.tolist(), labels, self.rle(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": int(category_ids[label - 1]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
                "segmentation": segmentation,
            }
            for (x1, y1, x2, y2), score, label, segmentation in rows
        ]

    def select(self, score_threshold: float | Sequence[float], max_detections: int) -> Detections:
        """The first of those that score high enough, in order.

        Args:
            score_threshold: lowest score that stays; one for all, or one of each label: `score_threshold[label - 1]`.
            max_detections: most that stay, 0 or more.

        Raises:
            ValueError: a label that has no threshold, or max_detections below 0.
        """
        if max_detections < 0:
            raise ValueError(f"max_detections must be at least 0, not {max_detections}")
        least: Tensor | float
        if isinstance(score_threshold, Sequence):
            highest = int(self.labels.max()) if len(self) else 0
            if highest > len(score_threshold):
                raise ValueError(f"detections: label {highest} has no threshold, there are {len(score_threshold)}")
            is_array = isinstance(self.scores, np.ndarray)
            of_labels: Any = (
                np.array(score_threshold, np.float32) if is_array else self.scores.new_tensor(score_threshold)
            )
            least = of_labels[self.labels - 1]  # [n]
        else:
            least = score_threshold
        wanted = self.scores >= least  # [n]
        rows = np.flatnonzero(wanted) if isinstance(wanted, np.ndarray) else wanted.nonzero()[:, 0]
        return self.rows(rows[:max_detections])

    def rows(self, rows: Any) -> Detections:  # integers [k]: a tensor, an array or a list
        """The detections of these rows."""
        known = {name: getattr(self, name) for name in ("counts", "areas") if getattr(self, name) is not None}
        if known:
            numbers = rows if isinstance(rows, list) else rows.tolist()
            known = {name: tuple(values[number] for number in numbers) for name, values in known.items()}
        return replace(
            self,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            mask_probs=self.mask_probs[rows],
            **known,
        )

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on another device, as tensors."""
        if isinstance(self.boxes, np.ndarray):
            import torch

            tensors = (torch.from_numpy(getattr(self, name)) for name in _TENSORS)
        else:
            tensors = (getattr(self, name) for name in _TENSORS)
        return replace(self, **{name: tensor.to(device) for name, tensor in zip(_TENSORS, tensors, strict=True)})


def with_counts(found: Sequence[Detections]) -> list[Detections]:
    """The same detections of several pictures, with their masks' counts and areas: on a GPU those of all at once."""
    first = next((one for one in found if len(one)), None)
    if first is None or isinstance(first.mask_probs, np.ndarray):
        rles = [one.rle() for one in found]
        encoded = [([rle["counts"] for rle in own], rle_areas(own)) for own in rles]
    else:
        from dsg.ops.masks import encode_mask_batches

        batches = [(one.mask_probs, one.boxes, one.image_size) for one in found]
        encoded = encode_mask_batches(batches, paste=first.paste)
    return [
        replace(one, counts=tuple(texts), areas=tuple(areas))
        for one, (texts, areas) in zip(found, encoded, strict=True)
    ]


def on_cpu(found: Sequence[Detections]) -> list[Detections]:
    """The same detections of several pictures of one network, all brought from its device in one wait for it."""
    first = next(iter(found), None)
    if first is None or isinstance(first.boxes, np.ndarray) or first.boxes.device.type == "cpu":
        return list(found)
    import torch

    numbers = [len(one) for one in found]
    moved = {name: torch.cat([getattr(one, name) for one in found]).to("cpu", non_blocking=True) for name in _TENSORS}
    torch.cuda.current_stream(first.boxes.device).synchronize()
    parts = {name: tensor.split(numbers) for name, tensor in moved.items()}
    return [replace(one, **{name: part[index] for name, part in parts.items()}) for index, one in enumerate(found)]


def _is_floating(values: Any) -> bool:
    return bool(
        np.issubdtype(values.dtype, np.floating) if isinstance(values, np.ndarray) else values.is_floating_point()
    )
