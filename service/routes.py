"""The endpoints: each checks what it was sent, cheapest first, and leaves the work to the other files."""

import hmac
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from dsg.service.body import RAW_TYPES, picture_type, read_body, split_body
from dsg.service.pipeline import Job, answer, while_wanted
from dsg.service.problems import Problem, problem_documentation
from dsg.service.query import JSON, PNG, SegmentQuery, answer_type, timeout_ms, wanted
from dsg.service.state import Service

router = APIRouter()
_LARGEST_RELOAD_BODY = 4096
# What load balancers probe. Such a route answers; the one written above it only documents: FastAPI would give both
# methods of one route the same operation id.
_PROBED = ["GET", "HEAD"]
# The page runs what is in it and talks to this server; nothing else may come in.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PICTURE = {"type": "string", "format": "binary"}
_SEGMENT_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "items": _PICTURE, "minItems": 1}},
            }
        },
        **{media_type: {"schema": _PICTURE} for media_type in sorted(RAW_TYPES)},
    },
}


class ReloadBody(BaseModel):
    """Body of `POST /models/reload`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Name of a file in the model folder, with or without its ending."""


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    return request.app.state.service


CurrentService = Annotated[Service, Depends(service_of)]


@router.post(
    "/segment",
    response_class=Response,
    responses={
        200: {
            "description": "a COCO document, or the picture with its masks drawn on it",
            "content": {JSON: {"schema": {"type": "object"}}, PNG: {"schema": _PICTURE}},
        },
        **problem_documentation(400, 406, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": _SEGMENT_BODY,
        "parameters": [
            {
                "name": "X-Timeout-Ms",
                "in": "header",
                "schema": {"type": "integer", "minimum": 1},
                "description": "milliseconds after which the answer is of no use; at most the server's",
            }
        ],
    },
)
async def segment(request: Request, query: Annotated[SegmentQuery, Query()], service: CurrentService) -> Response:
    """Find the instances in one or more pictures.

    Send parts named `image` as multipart/form-data, or one file as the body with its own type. Coordinates
    belong to the picture as a person sees it: its EXIF orientation is applied.
    """
    service.check_ready()
    picture_type(request)
    media_type = answer_type(request.headers.get("accept"))
    predictor = service.models.get(query.model)
    name = query.model or service.models.names()[0]
    asked = wanted(query, predictor.info)
    settings = service.settings
    deadline = request.state.started + timeout_ms(request, settings.deadline_ms) / 1000
    service.admission.check()
    log = request.state.log

    async def work(body: bytes) -> Response:
        content_type = request.headers["content-type"]
        uploads = await service.decoding(partial(split_body, content_type, body, settings.max_pictures))
        log.update(model=name, bytes=len(body), pictures=len(uploads))
        del body  # the uploads are a copy of it
        if media_type == PNG and len(uploads) > 1:
            raise Problem(422, "one_picture", f"{PNG} answers one picture; send one, or accept {JSON}")
        # A picture is drawn from RLE, whatever the format of masks asked for.
        shown = replace(asked, mask_format="rle") if media_type == PNG else asked
        return await answer(service, Job(uploads, shown, media_type, name, predictor, deadline), log)

    reading = read_body(request, settings.max_bytes, settings.body_timeout_ms / 1000, deadline)
    # The body has no name here, so that nothing holds it once it has been taken apart.
    return await while_wanted(work(await reading), request.receive, deadline)


@router.get("/healthz", responses=problem_documentation(503))
@router.api_route("/healthz", methods=_PROBED, include_in_schema=False)
async def healthz(service: CurrentService) -> dict[str, str]:
    """Whether the process is alive and its device sound; if not, restart it."""
    service.check_healthy()
    return {"status": "ok"}


@router.get("/readyz", responses=problem_documentation(503))
@router.api_route("/readyz", methods=_PROBED, include_in_schema=False)
async def readyz(service: CurrentService) -> dict[str, str]:
    """Whether the model is warm and pictures are taken."""
    service.check_ready()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


@router.get("/models")
async def models(service: CurrentService) -> dict[str, list[dict[str, Any]]]:
    """The models being served, the default one first."""
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
    responses=problem_documentation(401, 408, 413, 422, 500, 503),
    openapi_extra={
        "requestBody": {"required": True, "content": {JSON: {"schema": ReloadBody.model_json_schema()}}},
        "security": [{"reload key": []}],
    },
)
async def reload(request: Request, service: CurrentService) -> dict[str, str]:
    """Load a model anew from the model folder and swap it in, without dropping a request.

    Needs `Authorization: Bearer KEY` with the server's DSG_RELOAD_KEY.
    """
    _check_reload_key(request, service)
    service.check_ready()
    body = await read_body(request, _LARGEST_RELOAD_BODY, service.settings.body_timeout_ms / 1000)
    try:
        asked = ReloadBody.model_validate_json(body).model
    except ValidationError:
        raise Problem(422, "wrong_parameter", 'the body is a JSON object with one member: {"model": NAME}') from None
    name = await service.reload(asked)
    return {"model": name, "hash": service.models.get(name).info.hash}


@router.api_route("/", methods=_PROBED, response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """A page to try the service."""
    text = (files("dsg.service") / "page" / "index.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})


def _check_reload_key(request: Request, service: Service) -> None:
    key = service.settings.reload_key
    if key is None:
        detail = "reloading is off; set DSG_RELOAD_KEY and restart the server to use it"
        raise Problem(401, "no_key", detail, {"WWW-Authenticate": "Bearer"})
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.encode(), key.get_secret_value().encode())
    if scheme.lower() != "bearer" or not right:
        detail = "the key is missing or wrong; send 'Authorization: Bearer KEY'"
        raise Problem(401, "wrong_key", detail, {"WWW-Authenticate": "Bearer"})
