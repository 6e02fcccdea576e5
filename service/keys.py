"""Keys of clients and of the operator, compared so that the time it takes tells nothing."""

import hmac
from collections.abc import Sequence

from fastapi import Request

from dsg.service.problems import Problem

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def check_client_key(request: Request, keys: Sequence[str]) -> None:
    """Raise the 401 problem unless a request brings one of the keys; where there are none, none is asked for."""
    if keys and not _is_one_of([_bearer(request), request.headers.get("x-api-key", "")], keys):
        detail = "the key is missing or wrong; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        raise Problem(401, "wrong_key", detail, _CHALLENGE)


def check_reload_key(request: Request, key: str | None) -> None:
    """Raise the 401 problem unless a request brings the key of `POST /models/reload`."""
    if key is None:
        detail = "reloading is off; set DSG_RELOAD_KEY and restart the server to use it"
        raise Problem(401, "no_key", detail, _CHALLENGE)
    if not _is_one_of([_bearer(request)], [key]):
        raise Problem(401, "wrong_key", "the key is missing or wrong; send 'Authorization: Bearer KEY'", _CHALLENGE)


def _bearer(request: Request) -> str:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else ""


def _is_one_of(given: Sequence[str], keys: Sequence[str]) -> bool:
    # All are compared, whichever is right.
    return any([hmac.compare_digest(one.encode(), key.encode()) for one in given for key in keys])
