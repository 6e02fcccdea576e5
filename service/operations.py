"""Endpoints for whoever runs the service: probes, metrics, models."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import Response

from dsg.service.body import read_body
from dsg.service.documents import Healthy, ModelEntry, ModelListing, Ready, ReloadBody, Reloaded
from dsg.service.keys import check_client_key, check_reload_key
from dsg.service.openapi import NOT_READY, problems
from dsg.service.pages import PROBED
from dsg.service.problems import Problem
from dsg.service.query import JSON
from dsg.service.state import Service

router = APIRouter()
_LARGEST_RELOAD_BODY = 4096


async def service_of(request: Request) -> Service:  # async: FastAPI runs other functions on a thread of their own
    """The service of the application that a request came to."""
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(service_of)]


def _example(value: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "OK", "content": {JSON: {"example": value}}}}


# A probed route answers; the one written above it only documents: FastAPI would give both methods of one route the same
# operation id.
@router.get("/healthz", responses=_example({"status": "ok"}) | problems("unhealthy"))
@router.api_route("/healthz", methods=PROBED, include_in_schema=False)
async def healthz(service: CurrentService) -> Healthy:
    """Whether the process is alive and its devices sound; if not, restart it."""
    service.check_healthy()
    return Healthy(status="ok")


@router.get("/readyz", responses=_example({"status": "ready"}) | problems(*NOT_READY))
@router.api_route("/readyz", methods=PROBED, include_in_schema=False)
async def readyz(service: CurrentService) -> Ready:
    """Whether the models are warm and pictures are taken."""
    service.check_ready()
    return Ready(status="ready")


_METRICS = {
    "content": {"text/plain": {"schema": {"type": "string"}, "example": "dsg_queued_pictures 3.0\n"}},
    "description": "Prometheus' text",
}


@router.get("/metrics", response_class=Response, responses={200: _METRICS, **problems()})
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


@router.get("/models", responses=_example(_MODELS) | problems("wrong_key"))
async def models(request: Request, service: CurrentService) -> ModelListing:
    """The models being served, the default one first; none while they are loading."""
    check_client_key(request, service.settings.keys)
    served = [service.models.get(name) for name in service.models.names()]
    return ModelListing(models=[ModelEntry.of(one, default=one is served[0]) for one in served])


@router.post(
    "/models/reload",
    responses=_example({"model": "best", "hash": "5e1c0b"})
    | problems(
        *("no_key", "wrong_key", "too_many_bytes", "wrong_parameter", "unknown_model", "no_model_dir", "broken_model"),
        *("slow_sender", "internal", *NOT_READY, "partly_reloaded", "not_reloaded", "out_of_memory"),
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": ReloadBody.model_json_schema(), "example": {"model": "best"}}},
        },
        "security": [{"reload key": []}],
    },
)
async def reload(request: Request, service: CurrentService) -> Reloaded:
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
    return Reloaded(model=model.name, hash=model.info.hash)
