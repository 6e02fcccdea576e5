"""What a request asks for: query, `Accept`, `X-Timeout-Ms`; checked, joined with the checkpoint's values."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from dsg.service.problems import Problem

if TYPE_CHECKING:
    from dsg.model.network.checkpoint import CheckpointInfo

MaskFormat = Literal["rle", "polygon", "none"]
JSON = "application/json"
PNG = "image/png"


class SegmentQuery(BaseModel):
    """Query parameters of `POST /segment`. A name that is not here is refused: it is most likely a slip."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    score_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="lowest score of an answer, 0 to 1 (default: the model's, which may be one of each category)",
    )
    max_detections: int | None = Field(
        None, ge=1, description="most instances a picture (default and cap: the model's)"
    )
    mask_format: MaskFormat = Field(
        "rle", description="rle: COCO compressed RLE; polygon: COCO polygons, RLE for an empty mask; none: no masks"
    )
    categories: str | None = Field(
        None, description="names of the categories to answer with, comma separated (default: all)"
    )
    model: str | None = Field(None, description="name of a model in /models (default: the first)")


@dataclass(frozen=True)
class Wanted:
    """What one request gets, every default filled in."""

    score_threshold: float | tuple[float, ...]
    """One for all, or one of each label."""
    max_detections: int
    mask_format: MaskFormat
    labels: frozenset[int] | None
    """Labels (1..num_classes) to answer with; None for all."""


def wanted(query: SegmentQuery, info: "CheckpointInfo") -> Wanted:
    """Join a query with a checkpoint's values. Raises the 422 problem for what it does not have."""
    if query.max_detections is not None and query.max_detections > info.max_detections:
        detail = f"max_detections {query.max_detections} is above this model's {info.max_detections}"
        raise Problem(422, "wrong_parameter", detail)
    threshold = info.default_threshold if query.score_threshold is None else query.score_threshold
    return Wanted(threshold, query.max_detections or info.max_detections, query.mask_format, _labels(query, info))


def _labels(query: SegmentQuery, info: "CheckpointInfo") -> frozenset[int] | None:
    if query.categories is None:
        return None
    names = {name.strip() for name in query.categories.split(",")}
    unknown = sorted(names - {category.name for category in info.categories})
    if unknown:
        detail = f"no category is named {', '.join(map(repr, unknown))[:200]}; /models lists what there is"
        raise Problem(422, "unknown_category", detail)
    return frozenset(label for label, category in enumerate(info.categories, 1) if category.name in names)


def check_once(request: Request) -> None:
    """Raise the 422 problem for a query parameter that is given twice: only one of its values could count."""
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise Problem(422, "wrong_parameter", f"{name[:80]} is given {count} times; give it once")


def answer_type(accept: str) -> str:
    """`application/json` or `image/png`, what an `Accept` header likes better; JSON where it does not care.

    Raises:
        Problem: 406, it likes neither.
    """
    if not accept.strip():
        return JSON
    preference = {JSON: 0.0, PNG: 0.0}
    how_exactly = {JSON: 0, PNG: 0}
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        quality = quality if 0 <= quality <= 1 else 0.0  # which no comparison with NaN is
        for known in preference:
            exactness = {"*/*": 1, known.split("/")[0] + "/*": 2, known: 3}.get(media, 0)
            if exactness > how_exactly[known]:
                how_exactly[known], preference[known] = exactness, quality
    if not max(preference.values()) > 0:
        raise Problem(406, "not_acceptable", f"answers come as {JSON} or, for one picture, {PNG}; Accept names neither")
    return PNG if preference[PNG] > preference[JSON] else JSON


def timeout_ms(request: Request, longest_ms: int) -> int:
    """What `X-Timeout-Ms` asks for, at most `longest_ms`; that where it is absent. Raises the 422 problem."""
    text = request.headers.get("x-timeout-ms")
    if text is None:
        return longest_ms
    digits = text.lstrip("0")
    if not (digits.isascii() and digits.isdigit()):
        raise Problem(422, "wrong_parameter", "X-Timeout-Ms is a whole number of milliseconds above 0")
    # Python reads no number of thousands of digits; the first 18 are an age already.
    return min(int(digits[:18]), longest_ms)
