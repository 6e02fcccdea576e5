"""Errors as `application/problem+json` (RFC 9457): one exception that says status and cause."""

import errno
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

CLIENT_GONE = 499
"""Status of a request whose client hung up: seen in logs and metrics, sent to no one."""


class Problem(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        reason: one word for programs and metrics, such as `queue_full`.
        detail: one sentence for people: what is wrong and what to do. Never a path or a traceback.
        headers: of the answer.
        members: further members of the document, such as `index=2` for the picture at fault.
    """

    def __init__(
        self, status: int, reason: str, detail: str, headers: dict[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.headers = headers or {}
        self.members = members

    def of_picture(self, index: int) -> "Problem":
        """The same problem, said of one picture of a request (counted from 0)."""
        detail = f"picture {index}: {self.detail}"
        return Problem(self.status, self.reason, detail, self.headers, **self.members, index=index)


def problem_response(problem: Problem) -> Response:
    """The answer that a problem stands for."""
    document = {
        "type": "about:blank",
        "title": "Client Closed Request" if problem.status == CLIENT_GONE else HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "reason": problem.reason,
        "detail": problem.detail,
        **problem.members,
    }
    return Response(
        orjson.dumps(document), problem.status, headers=problem.headers, media_type="application/problem+json"
    )


def internal_error() -> Problem:
    """What a client is told when the fault is ours; the log has the rest, under the request's id."""
    return Problem(500, "internal", "something broke here, not in the request; the log knows it by the X-Request-Id")


def stopping() -> Problem:
    """What a request is told that comes, or is still there, when the server ends."""
    headers = {"Connection": "close", "Retry-After": "5"}
    return Problem(503, "draining", "this server is about to stop; ask another, or later", headers)


def out_of_memory() -> Problem:
    """What a request is told whose picture alone does not fit into the device's memory now."""
    return _full("the device's memory is full, even for one picture; try again soon, or send a smaller one")


def server_is_full() -> Problem:
    """What a request is told for which this process gets no memory, threads or descriptors now."""
    return _full("this server has no memory, threads or files left for another request; try again soon")


def _full(detail: str) -> Problem:
    return Problem(503, "out_of_memory", detail, {"Retry-After": "5"})


def is_shortage(error: BaseException) -> bool:
    """Whether the system has refused memory, a thread or a descriptor."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return isinstance(error, MemoryError) or str(error) == "can't start new thread"


def too_many_bytes(max_bytes: int) -> Problem:
    """What a request is told whose body is larger than allowed, declared or sent."""
    detail = f"the body has more than {max_bytes} bytes"
    return Problem(413, "too_many_bytes", detail, {"Connection": "close"})


def deadline_passed(headers: dict[str, str] | None = None) -> Problem:
    """What a request is told whose deadline passes before its answer is ready."""
    detail = "no answer was ready in time; allow more, send less, or try again later"
    return Problem(504, "deadline_passed", detail, headers)


def install_problem_handlers(app: FastAPI) -> None:
    """Make every error of the application a problem document."""

    @app.exception_handler(Problem)
    async def _own(request: Request, problem: Problem) -> Response:
        request.state.log["reason"] = problem.reason
        return problem_response(problem)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        details = {
            404: f"there is nothing at {request.url.path}; /docs lists what there is",
            405: f"{request.method} is not for {request.url.path}; the Allow header lists what is",
        }
        reason = HTTPStatus(error.status_code).name.lower()
        detail = details.get(error.status_code, str(error.detail))
        return await _own(request, Problem(error.status_code, reason, detail, dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        errors = [
            {"parameter": ".".join(str(part) for part in one["loc"][1:]), "detail": _detail_of(one)}
            for one in error.errors()
        ]
        detail = "; ".join(f"{one['parameter']}: {one['detail']}" for one in errors)
        return await _own(request, Problem(422, "wrong_parameter", detail, errors=errors))


def _detail_of(error: dict[str, Any]) -> str:
    unknown = error["type"] == "extra_forbidden"
    return "there is no such parameter; /docs lists what there is" if unknown else str(error["msg"])
