"""Endpoints for whoever runs the service: probes, metrics, models."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from dsg.service.body import read_body
from dsg.service.keys import check_client_key, check_reload_key
from dsg.service.openapi import problems
from dsg.service.pages import PROBED
from dsg.service.problems import Problem
from dsg.service.query import JSON
from dsg.service.state import Service

router = APIRouter()
_LARGEST_RELOAD_BODY = 4096


class ReloadBody(BaseModel):
    """Body of `POST /models/reload`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Name of a file in the model folder, with or without its ending."""


async def service_of(request: Request) -> Service:  # async: FastAPI runs other functions on a thread of their own
    """The service of the application that a request came to."""
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(service_of)]


def _example(value: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "OK", "content": {JSON: {"example": value}}}}


# A probed route answers; the one written above it only documents: FastAPI would give both methods of one route the same
# operation id.
@router.get("/healthz", responses=_example({"status": "ok"}) | problems(503))
@router.api_route("/healthz", methods=PROBED, include_in_schema=False)
async def healthz(service: CurrentService) -> dict[str, str]:
    """Whether the process is alive and its devices sound; if not, restart it."""
    service.check_healthy()
    return {"status": "ok"}


@router.get("/readyz", responses=_example({"status": "ready"}) | problems(503))
@router.api_route("/readyz", methods=PROBED, include_in_schema=False)
async def readyz(service: CurrentService) -> dict[str, str]:
    """Whether the models are warm and pictures are taken."""
    service.check_ready()
    return {"status": "ready"}


_METRICS = {"content": {"text/plain": {"example": "dsg_queued_pictures 3.0\n"}}, "description": "Prometheus' text"}


@router.get("/metrics", response_class=Response, responses={200: _METRICS})
async def metrics(service: CurrentService) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(await service.metrics_page(), media_type=service.metrics.content_type)


_MODELS = {
    "models": [
        {
            "name": "dsg_lite0_coco",
            "default": True,
            "preset": "dsg_lite0_fpn",
            "version": "0.1.0",
            "hash": "5e1c0b",
            "licence": "Apache-2.0",
            "score_threshold": 0.4,
            "class_thresholds": [0.42],
            "class_precision": 0.7,
            "max_detections": 100,
            "categories": [{"id": 18, "name": "dog"}],
        }
    ]
}


@router.get("/models", responses=_example(_MODELS) | problems(401))
async def models(request: Request, service: CurrentService) -> dict[str, list[dict[str, Any]]]:
    """The models being served, the default one first; none while they are loading."""
    check_client_key(request, service.settings.keys)
    listing: list[dict[str, Any]] = []
    for name in service.models.names():
        info = service.models.get(name).info
        listing.append(
            {
                "name": name,
                "default": not listing,
                "preset": info.preset,
                "version": info.version,
                "hash": info.hash,
                "licence": info.licence,
                "score_threshold": info.score_threshold,
                "class_thresholds": list(info.class_thresholds),
                "class_precision": info.class_precision,
                "max_detections": info.max_detections,
                "categories": [{"id": category.id, "name": category.name} for category in info.categories],
            }
        )
    return {"models": listing}


@router.post(
    "/models/reload",
    responses=_example({"model": "best", "hash": "5e1c0b"}) | problems(401, 408, 413, 422, 500, 503, reload=True),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": ReloadBody.model_json_schema(), "example": {"model": "best"}}},
        },
        "security": [{"reload key": []}],
    },
)
async def reload(request: Request, service: CurrentService) -> dict[str, str]:
    """Load a model anew from the model folder and swap it in, without dropping a request.

    Needs `Authorization: Bearer KEY` with the server's DSG_RELOAD_KEY.
    """
    key = service.settings.reload_key
    check_reload_key(request, key.get_secret_value() if key else None)
    service.check_ready()
    body = await read_body(request, _LARGEST_RELOAD_BODY, service.settings.body_timeout_ms / 1000)
    try:
        asked = ReloadBody.model_validate_json(body).model
    except ValidationError:
        raise Problem(422, "wrong_parameter", 'the body is a JSON object with one member: {"model": NAME}') from None
    model = await service.reload(asked)
    return {"model": model.name, "hash": model.info.hash}
