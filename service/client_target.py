"""The server that the Python client asks, checked before anything is sent."""

import threading
from typing import Any

import httpx

_LONGEST_LABEL = 63  # of a host's name, between its dots
_LAST_PORT = 65_535


class Target:
    """A server, and how it is asked.

    Args:
        url: http:// or https://, a host, perhaps a path before the service's own.
        key: sent with each request; blanks around it, such as the line feed of a file, are left out.
        timeout_s: of one call.

    Raises:
        ValueError: one of them can't be; a key is not repeated.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        parsed = _parsed(url)
        self.url = str(parsed.copy_with(userinfo=b""))
        """Without what is secret in it."""
        # Also no number at all is not above 0; what is above the other bound no thread can wait for.
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s is a number of seconds above 0, not {timeout_s}")
        self.timeout_s = timeout_s
        self.http: dict[str, Any] = {"base_url": parsed, "headers": _authorization(key)}


def _authorization(key: str | None) -> dict[str, str]:
    word = (key or "").strip()
    if not (word.isascii() and word.isprintable()):
        raise ValueError("the key has something in it that is no ASCII letter, digit or sign: see where it comes from")
    return {"Authorization": f"Bearer {word}"} if word else {}


def _parsed(url: str) -> httpx.URL:
    wanted = "give http:// or https://, a host, and a port where it has one"
    try:
        parsed = httpx.URL(url)
        host, port = parsed.host, parsed.port
    except (httpx.InvalidURL, TypeError, ValueError) as failure:  # of a host's name in other letters, as well
        raise ValueError(f"the url of a server can't be read ({failure}): {wanted}") from None
    labels = [] if ":" in host else host.removesuffix(".").split(".")
    if (
        parsed.scheme not in ("http", "https")
        or not host
        or not all(0 < len(label) <= _LONGEST_LABEL for label in labels)
        or (port is not None and not 0 < port <= _LAST_PORT)
    ):
        raise ValueError(f"{str(parsed.copy_with(userinfo=b''))!r} is no url of a server: {wanted}")
    if parsed.query or parsed.fragment:
        raise ValueError(f"the url of a server ends with its path, before ? and #: {wanted}")
    return parsed
