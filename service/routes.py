"""`POST /segment`: checks what it was sent, cheapest first, and leaves the work to the other files."""

import time
from dataclasses import replace
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from dsg.service.body import picture_type, read_body
from dsg.service.keys import check_client_key
from dsg.service.openapi import OF_PICTURES, SEGMENT_ANSWER, SEGMENT_BODY, SEGMENT_HEADERS, problems
from dsg.service.operations import CurrentService
from dsg.service.pipeline import Job, answer, while_wanted
from dsg.service.query import PNG, SegmentQuery, answer_type, check_once, timeout_ms, wanted

router = APIRouter()


@router.post(
    "/segment",
    response_class=Response,
    responses={200: SEGMENT_ANSWER, **problems(*OF_PICTURES)},
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
    check_once(request)
    media_type = answer_type(",".join(request.headers.getlist("accept")))
    model = service.models.get(query.model)
    asked = wanted(query, model.info)
    # A picture is drawn from RLE, whatever the format of masks asked for.
    shown = replace(asked, mask_format="rle") if media_type == PNG else asked
    deadline = request.state.started + timeout_ms(request, settings.deadline_ms) / 1000
    service.admission.check(deadline - time.monotonic())
    job = Job(request.headers["content-type"], shown, media_type, model, deadline)
    with service.admission.hold() as hold:
        taken = partial(hold.take, "bytes")
        reading = read_body(request, settings.max_bytes, settings.body_timeout_ms / 1000, deadline, taken)
        # The body has no name here, so that nothing holds it once it has been taken apart.
        log = request.state.log
        working = answer(service, job, [await reading], hold, log, request.state.stages)
        with service.admission.flow.one(lambda: log.get("pictures", 1) > 1):
            return await while_wanted(working, request.receive, deadline)
