"""`POST /segment`: checks what it was sent, cheapest first, and leaves the work to the other files."""

import time
from dataclasses import replace
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from dsg.service.body import Upload, picture_type, read_body, split_body
from dsg.service.decode import pixels_of
from dsg.service.keys import check_client_key
from dsg.service.openapi import SEGMENT_ANSWER, SEGMENT_BODY, SEGMENT_HEADERS, problems
from dsg.service.operations import CurrentService
from dsg.service.pipeline import Job, answer, while_wanted
from dsg.service.problems import Problem
from dsg.service.query import PNG, SegmentQuery, answer_type, timeout_ms, wanted
from dsg.service.settings import Settings

router = APIRouter()


@router.post(
    "/segment",
    response_class=Response,
    responses={200: SEGMENT_ANSWER, **problems(400, 401, 406, 408, 413, 415, 422, 429, 500, 503, 504)},
    openapi_extra={"requestBody": SEGMENT_BODY, "parameters": SEGMENT_HEADERS},
)
async def segment(request: Request, query: Annotated[SegmentQuery, Query()], service: CurrentService) -> Response:
    """Find the instances in one or more pictures.

    Send parts named `image` as multipart/form-data, or one file as the body with its own type. Coordinates
    belong to the picture as a person sees it: its EXIF orientation is applied.
    """
    settings = service.settings
    check_client_key(request, settings.keys)
    service.check_ready()
    picture_type(request)
    media_type = answer_type(request.headers.get("accept"))
    model = service.models.get(query.model)
    asked = wanted(query, model.info)
    deadline = request.state.started + timeout_ms(request, settings.deadline_ms) / 1000
    service.admission.check(deadline - time.monotonic())
    log = request.state.log

    async def work(body: bytes) -> Response:
        content_type = request.headers["content-type"]
        uploads, pixels = await service.decoding(partial(_take_apart, content_type, body, settings))
        log.update(model=model.name, bytes=len(body), pictures=len(uploads))
        del body  # the uploads are a copy of it
        if media_type == PNG and len(uploads) > 1:
            raise Problem(422, "one_picture", f"{PNG} answers one picture; send one, or accept JSON")
        # A picture is drawn from RLE, whatever the format of masks asked for.
        shown = replace(asked, mask_format="rle") if media_type == PNG else asked
        job = Job(uploads, pixels, shown, media_type, model, deadline)
        return await answer(service, job, hold, log, request.state.stages)

    with service.admission.hold() as hold:
        taken = partial(hold.take, "bytes")
        reading = read_body(request, settings.max_bytes, settings.body_timeout_ms / 1000, deadline, taken)
        # The body has no name here, so that nothing holds it once it has been taken apart.
        working = work(await reading)
        with service.admission.flow.one():
            return await while_wanted(working, request.receive, deadline)


def _take_apart(content_type: str, body: bytes, settings: Settings) -> tuple[list[Upload], int]:
    """The pictures of a body, and their pixels by their headers."""
    uploads = split_body(content_type, body, settings.max_pictures)
    return uploads, sum(pixels_of(upload.data, settings.max_pixels) for upload in uploads)
