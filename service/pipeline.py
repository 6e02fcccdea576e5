"""One request to /segment: decode, queue and device, encode; in time, and while its client is there."""

import asyncio
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive

from dsg.model.network.detections import lowest_of
from dsg.service.admission import Hold
from dsg.service.batching import DeadlinePassed, DeviceLost, DeviceStopped, Outcome, OutOfMemory
from dsg.service.body import Upload, split_body
from dsg.service.decode import decode_picture, pixels_of
from dsg.service.encode import Answered, coco_document, to_json
from dsg.service.models import ServedModel
from dsg.service.overlay import draw_instances, to_png
from dsg.service.problems import CLIENT_GONE, Problem, deadline_passed, out_of_memory, stopping
from dsg.service.query import PNG, Wanted
from dsg.service.settings import Settings
from dsg.service.state import Service

if TYPE_CHECKING:
    from dsg.model.network.predictor import PreparedImage


@dataclass(frozen=True)
class Job:
    """A request that was checked as far as it can be without looking at its body."""

    content_type: str
    """Of the body, with its parameters."""
    wanted: Wanted
    media_type: str
    """Of the answer: `application/json` or `image/png`."""
    model: ServedModel
    deadline: float
    """On the clock of `time.monotonic`."""


@dataclass(frozen=True)
class Opened:
    """What was in a body."""

    uploads: list[Upload]
    """Emptied once they are decoded."""
    waiting: list[Future[Outcome]]
    """What a device makes of the only one; where there are several they have yet to be decoded, side by side."""
    decoded: float
    """When the only one was, on the clock of `time.monotonic`."""


async def answer(
    service: Service, job: Job, body: list[bytes], hold: Hold, log: dict[str, Any], stages: dict[str, float]
) -> Response:
    """Run a request through all stages.

    Args:
        service: with room for each picture and its pixels (429 otherwise).
        job: the request.
        body: all of it; taken out of the list once it is taken apart.
        hold: has its bytes; they are given back once they are decoded.
        log: takes what came, the stages' durations in milliseconds, and how many pictures ran together at most.
        stages: takes the stages' durations in seconds, in their order.
    """
    started = time.monotonic()
    log.update(model=job.model.name, bytes=len(body[0]))
    with _named_problems(service):
        opened = await service.decoding(partial(_open, service, job, body, hold, log))
        waiting, decoded = opened.waiting, opened.decoded
        if not waiting:
            pictures = await _decode(service, job, opened.uploads)
            decoded = time.monotonic()
            waiting = _submit(service, job, hold, pictures)
            pictures.clear()  # the devices have them, and let go of them
        names = [upload.name for upload in opened.uploads]
        drawn_on = opened.uploads[0].data if job.media_type == PNG else b""
        opened.uploads.clear()  # whoever waits for the device keeps a resized picture, and no file of many megabytes
        if not drawn_on:
            hold.give_back("bytes")
        content = await service.encoding_of(waiting, partial(_encode, service, job, names, drawn_on))
    outcomes = [future.result() for future in waiting]
    last = max(outcomes, key=lambda outcome: outcome.known)  # of one picture, so that they follow one another
    stages["decode"] = decoded - started
    stages["queue"] = last.queue_s
    stages["infer"] = last.infer_s
    stages["encode"] = time.monotonic() - last.known
    for stage, seconds in stages.items():
        service.metrics.stages.labels(stage).observe(seconds)
        log[f"{stage}_ms"] = round(seconds * 1000, 1)
    log["batch"] = max(outcome.batch_size for outcome in outcomes)
    timing = ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in stages.items())
    return Response(content, media_type=job.media_type, headers={"Server-Timing": timing})


async def while_wanted(work: Coroutine[Any, Any, Response], receive: Receive, deadline: float) -> Response:
    """Await `work`, and cancel it when its deadline passes (504) or its client hangs up (499).

    Args:
        work: what makes the answer.
        receive: of the request, whose body has been read: all that can still come is its end.
        deadline: on the clock of `time.monotonic`.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait(
            {task, gone}, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            return task.result()
        if gone.done():
            raise Problem(CLIENT_GONE, "client_gone", "the client hung up before its answer was ready")
        raise deadline_passed()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _open(service: Service, job: Job, body: list[bytes], hold: Hold, log: dict[str, Any]) -> Opened:
    """Take a body apart; decode a picture that is alone and queue it, since each change of threads waits for Python's
    lock."""
    settings = service.settings
    uploads = split_body(job.content_type, body.pop(), settings.max_pictures)
    log["pictures"] = len(uploads)
    if job.media_type == PNG and len(uploads) > 1:
        raise Problem(422, "one_picture", f"{PNG} answers one picture; send one, or accept JSON")
    hold.take("pictures", len(uploads))
    hold.take("pixels", sum(pixels_of(upload.data, settings.max_pixels) for upload in uploads))
    if len(uploads) > 1:
        return Opened(uploads, [], 0.0)
    picture = _prepare(settings, job, uploads[0].data)
    decoded = time.monotonic()
    return Opened(uploads, _submit(service, job, hold, [picture]), decoded)


def _prepare(settings: Settings, job: Job, data: bytes) -> "PreparedImage":
    if time.monotonic() >= job.deadline:
        raise deadline_passed()
    return job.model.prepare(decode_picture(data, settings.max_pixels))


async def _decode(service: Service, job: Job, uploads: list[Upload]) -> "list[PreparedImage]":
    tasks = [service.decoding(partial(_prepare, service.settings, job, upload.data)) for upload in uploads]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    pictures = []
    for index, result in enumerate(results):
        if isinstance(result, Problem):
            raise result.of_picture(index)
        if isinstance(result, BaseException):
            raise result
        pictures.append(result)
    return pictures


def _submit(service: Service, job: Job, hold: Hold, pictures: "list[PreparedImage]") -> list[Future[Outcome]]:
    service.admission.check_time(service.batcher.seconds_of_request(pictures), job.deadline - time.monotonic())
    waiting = service.batcher.submit(job.model, pictures, job.deadline, lowest_of(job.wanted.score_threshold))
    # Also where one picture has failed: its request has, and the others need not run.
    hold.cancel_at_end(waiting)
    return waiting


@contextmanager
def _named_problems(service: Service) -> Iterator[None]:
    """What a client is told of what a device could not do."""
    try:
        yield
    except DeadlinePassed:
        raise deadline_passed() from None
    except DeviceStopped:
        raise stopping() from None
    except OutOfMemory:
        raise out_of_memory() from None
    except DeviceLost:
        service.check_healthy()
        raise


def _encode(service: Service, job: Job, names: list[str], drawn_on: bytes, outcomes: list[Outcome]) -> bytes:
    answered = [Answered(name, one.detections) for name, one in zip(names, outcomes, strict=True)]
    document = coco_document(answered, job.wanted, job.model.info, job.model.name)
    if job.media_type != PNG:
        return to_json(document)
    # Decoded once more: to keep the pixels of every picture in the queue would take many times the memory.
    pixels = decode_picture(drawn_on, service.settings.max_pixels)
    categories = {category["id"]: category["name"] for category in document["categories"]}
    return to_png(draw_instances(pixels, document["annotations"], categories))
