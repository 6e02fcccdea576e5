"""What the endpoints for operators answer, field by field."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from dsg.service.models import ServedModel


class Document(BaseModel):
    """One of them; what is written below a field is its description in the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Healthy(Document):
    """Answer of `GET /healthz`."""

    status: Literal["ok"]


class Ready(Document):
    """Answer of `GET /readyz`."""

    status: Literal["ready"]


class CategoryEntry(Document):
    """One category of a model."""

    id: int
    """As in the file that the model was trained on."""
    name: str


class ModelEntry(Document):
    """One model of `GET /models`."""

    name: str
    default: bool
    """Whether it answers requests that name none."""
    preset: str
    version: str
    hash: str
    licence: str
    score_threshold: float
    class_thresholds: list[float]
    """One of each category, or none: then `score_threshold` is that of all."""
    class_precision: float
    """Share of right detections that `class_thresholds` were chosen for, 0 to 1; 0 where there are none."""
    max_detections: int
    categories: list[CategoryEntry]

    @classmethod
    def of(cls, model: ServedModel, default: bool) -> "ModelEntry":
        """The entry of a model that is served."""
        info = model.info
        return cls(
            name=model.name,
            default=default,
            preset=info.preset,
            version=info.version,
            hash=info.hash,
            licence=info.licence,
            score_threshold=info.score_threshold,
            class_thresholds=list(info.class_thresholds),
            class_precision=info.class_precision,
            max_detections=info.max_detections,
            categories=[CategoryEntry(id=one.id, name=one.name) for one in info.categories],
        )


class ModelListing(Document):
    """Answer of `GET /models`."""

    models: list[ModelEntry]


class ReloadBody(Document):
    """Body of `POST /models/reload`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Name of a file in the model folder, with or without its ending."""


class Reloaded(Document):
    """Answer of `POST /models/reload`."""

    model: str
    hash: str
