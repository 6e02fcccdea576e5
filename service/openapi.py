"""What the OpenAPI document says beside what FastAPI reads off the code: bodies, examples, every error."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from dsg.service.body import RAW_TYPES
from dsg.service.query import JSON, PNG

REASONS: dict[int, dict[str, str]] = {
    400: {
        "not_a_picture": "not a picture in JPEG, PNG, WebP, BMP or TIFF, or broken in its header",
        "empty_picture": "the picture is empty: 0 bytes",
        "broken_picture": "the picture is broken or cut short; send the whole file",
        "broken_multipart": "the multipart body is broken or cut short, or its boundary is missing",
        "broken_http": "this is not HTTP, or broken",
    },
    401: {
        "no_key": "reloading is off; set DSG_RELOAD_KEY and restart the server to use it",
        "wrong_key": "the key is missing or wrong; send 'Authorization: Bearer KEY'",
    },
    404: {"not_found": "there is nothing at /segments; /docs lists what there is"},
    405: {"method_not_allowed": "GET is not for /segment; the Allow header lists what is"},
    406: {"not_acceptable": f"answers come as {JSON} or, for one picture, {PNG}; Accept names neither"},
    408: {"slow_sender": "the body did not arrive within 30 s; send it faster, or less of it"},
    413: {
        "too_many_bytes": "the body has more than 32000000 bytes",
        "too_many_pixels": "20000 x 20000 is more than 64000000 pixels; send a smaller picture",
    },
    415: {
        "unsupported_type": "GIF is not taken; send JPEG, PNG, WebP, BMP or TIFF",
        "unsupported_pixels": "pixels of mode F have no agreed brightness; send 8 or 16 bits a channel",
        "several_frames": "the file has 3 frames; send one picture",
        "unsupported_encoding": "Content-Encoding gzip is not taken; send the file as it is",
    },
    422: {
        "wrong_parameter": "score_threshold: Input should be less than or equal to 1",
        "unknown_category": "no category is named 'unicorn'; /models lists what there is",
        "unknown_model": "no model is named 'best'; there are dsg_lite0_coco",
        "wrong_part": "a part is named 'file'; pictures are 'image', all else is query",
        "no_picture": "no part is named 'image'; send one for each picture",
        "one_picture": f"{PNG} answers one picture; send one, or accept {JSON}",
        "too_many_pictures": "more than 32 pictures in one request; send the rest in another",
        "no_model_dir": "this server has no model folder; set DSG_MODEL_DIR and restart it",
        "broken_model": "model 'best' does not load, and the log says why; what was served before still is",
    },
    429: {
        "queue_full": "128 pictures are in work already; try again in 3 s",
        "deadline_unreachable": "what waits already takes longer than allowed; try again in 2 s",
    },
    431: {"large_headers": "the headers are too large"},
    500: {"internal": "something broke here, not in the request; the log knows it by the X-Request-Id"},
    503: {
        "loading": "the model is still loading; try again soon",
        "draining": "this server is about to stop; ask another, or later",
        "unhealthy": "a device has failed and stays so until this process is restarted",
        "restarting": "the device is being restarted; try again soon",
        "replica_lost": "the replica that had this request is gone; send it again",
        "partly_reloaded": "2 replicas did not load 'best', and the log says why; ask again",
        "not_reloaded": "a device had no room for it, or stopped meanwhile, and the log says more; ask again",
        "out_of_memory": "the device's memory is full, even for one picture; try again soon, or send a smaller one",
    },
    504: {"deadline_passed": "no answer was ready in time; allow more, send less, or try again later"},
}
"""Every reason that a problem may give, by status, with a detail as it may read."""

# What any request may be answered with, before it is known which endpoint it is for.
_OF_HTTP = ("broken_http", "slow_sender", "large_headers")
_OF_RELOAD = ("no_key", "no_model_dir", "broken_model", "partly_reloaded", "not_reloaded")
_OF_NO_ENDPOINT = ("not_found", "method_not_allowed")
NOT_READY = ("loading", "draining", "unhealthy", "restarting")
OF_PICTURES = tuple(
    reason
    for reasons in REASONS.values()
    for reason in reasons
    if reason == "slow_sender" or reason not in (*_OF_HTTP, *_OF_RELOAD, *_OF_NO_ENDPOINT)  # of a body, as well
)
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "reason", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "reason": {"type": "string", "description": "one word for programs; the examples have those there are"},
        "detail": {"type": "string", "description": "one sentence for people"},
        "index": {"type": "integer", "description": "which picture of the request, counted from 0"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"parameter": {"type": "string"}, "detail": {"type": "string"}},
            },
        },
    },
}
_REQUEST_ID = {"X-Request-Id": {"schema": {"type": "string"}, "description": "as in the log"}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    405: {"Allow": {"schema": {"type": "string"}, "description": "the methods that there are"}},
    **{status: {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}} for status in (429, 503)},
}


def problems(*reasons: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the problems that an endpoint may answer with, by their reasons; those of HTTP go without
    saying."""
    entries: dict[int | str, dict[str, Any]] = {}
    for status, details in REASONS.items():
        shown = {
            reason: {
                "value": {
                    "type": "about:blank",
                    "title": HTTPStatus(status).phrase,
                    "status": status,
                    "reason": reason,
                    "detail": detail,
                }
            }
            for reason, detail in details.items()
            if reason in (*reasons, *_OF_HTTP)
        }
        if shown:
            content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": shown}
            # What HTTP itself is refused with is in no log.
            headers = {**(_REQUEST_ID if shown.keys() & {*reasons} else {}), **_HEADERS.get(status, {})}
            entries[status] = {
                "description": HTTPStatus(status).phrase,
                "content": {"application/problem+json": content},
                "headers": headers,
            }
    return entries


PICTURE = {"type": "string", "format": "binary"}
SEGMENT_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "items": PICTURE, "minItems": 1}},
            }
        },
        **{media_type: {"schema": PICTURE} for media_type in sorted(RAW_TYPES)},
    },
}
_ID = {"type": "integer"}
_MASK = {
    "description": "COCO compressed RLE, or polygons [x1, y1, x2, y2, ...]; [] where no masks were asked for",
    "oneOf": [
        {
            "type": "object",
            "required": ["size", "counts"],
            "properties": {
                "size": {"type": "array", "items": _ID, "minItems": 2, "maxItems": 2},
                "counts": {"type": "string"},
            },
        },
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    ],
}
_DOCUMENT = {
    "type": "object",
    "required": ["info", "images", "annotations", "categories"],
    "properties": {
        "info": {
            "type": "object",
            "required": ["model", "version", "hash", "licence"],
            "properties": {name: {"type": "string"} for name in ("description", "model", "version", "hash", "licence")},
        },
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "file_name", "width", "height"],
                "properties": {"id": _ID, "file_name": {"type": "string"}, "width": _ID, "height": _ID},
            },
        },
        "annotations": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd", "score"],
                "properties": {
                    "id": _ID,
                    "image_id": _ID,
                    "category_id": {"type": "integer", "description": "as in the file the model was trained on"},
                    "bbox": {
                        "type": "array",
                        "items": {"type": "number"},
                        "minItems": 4,
                        "maxItems": 4,
                        "description": "x, y, width, height in pixels of the picture as a person sees it",
                    },
                    "area": {"type": "integer", "description": "pixels of the mask"},
                    "segmentation": _MASK,
                    "iscrowd": {"type": "integer", "enum": [0]},
                    "score": {"type": "number", "minimum": 0, "maximum": 1},
                },
            },
        },
        "categories": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "name"],
                "properties": {"id": _ID, "name": {"type": "string"}, "supercategory": {"type": "string"}},
            },
        },
    },
}
_EXAMPLE = {
    "info": {
        "description": "instances found by a detector",
        "model": "dsg_lite0_coco",
        "version": "0.1.0",
        "hash": "5e1c0b",
        "licence": "Apache-2.0",
    },
    "images": [{"id": 1, "file_name": "photo.jpg", "width": 640, "height": 480}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 18,
            "bbox": [20.0, 10.0, 4.0, 3.0],
            "score": 0.92,
            "segmentation": {"size": [480, 640], "counts": "Z\\93m>00000fgP9"},
            "area": 12,
            "iscrowd": 0,
        }
    ],
    "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
}
SEGMENT_ANSWER = {
    "description": "a COCO document, or the picture with its masks drawn on it",
    "headers": {
        **_REQUEST_ID,
        "Server-Timing": {
            "schema": {"type": "string"},
            "description": "milliseconds of decode, queue, infer and encode",
            "example": "decode;dur=6.1, queue;dur=0.2, infer;dur=21.4, encode;dur=1.9",
        },
    },
    "content": {
        JSON: {"schema": {"$ref": "#/components/schemas/CocoDocument"}, "example": _EXAMPLE},
        PNG: {"schema": PICTURE},
    },
}
SEGMENT_HEADERS = [
    {
        "name": "X-Timeout-Ms",
        "in": "header",
        "schema": {"type": "integer", "minimum": 1},
        "example": 2000,
        "description": "milliseconds after which the answer is of no use; at most the server's",
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
        "description": "taken over into the answer and the log; made up where it is absent",
    },
]


def describe(app: FastAPI, needs_key: bool) -> None:
    """Add schemas and keys to the application's document.

    Args:
        app: whose document is made at the first request for it.
        needs_key: whether clients need a key.
    """
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        for parameter in document["paths"]["/segment"]["post"]["parameters"]:
            _without_null(parameter["schema"])
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(Problem=_PROBLEM, CocoDocument=_DOCUMENT)
        schemes = components.setdefault("securitySchemes", {})
        schemes["reload key"] = {"type": "http", "scheme": "bearer"}
        if needs_key:
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            schemes["key header"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
            for path, method in (("/segment", "post"), ("/models", "get")):
                document["paths"][path][method]["security"] = [{"key": []}, {"key header": []}]
        return document

    app.openapi = described  # type: ignore[method-assign]


def _without_null(schema: dict[str, Any]) -> None:
    """A parameter that may be left out is null in Python, and can't be in a query."""
    (kind,) = [one for one in schema.pop("anyOf", [{}]) if one != {"type": "null"}]
    schema.update(kind)
