"""What a setting may be: bounds beyond which a number is a slip, and words that could never work."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

A_DAY_MS = 86_400_000
_SHORTEST_KEY = 16
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#@]+")

# Above what any machine has: such a number would break requests, and not the start.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Size = Annotated[int, Field(ge=1, le=10**12)]
"""Bytes or pixels."""
Threads = Annotated[int, Field(ge=1, le=1024)]
Milliseconds = Annotated[int, Field(ge=1, le=A_DAY_MS)]


def parts(text: str) -> list[str]:
    """What stands between commas, without what is empty."""
    return [part.strip() for part in text.split(",") if part.strip()]


def above(name: str, value: int, bound_name: str, bound: int) -> str:
    """What to say of a setting that is above another one."""
    return f"DSG_{name.upper()} ({value}) is above DSG_{bound_name.upper()} ({bound}): it would never fit"


def _check_host(value: str) -> str:
    if not value.strip():
        raise ValueError("name an address: 127.0.0.1 for this machine alone, 0.0.0.0 for all that it has")
    return value


def _check_names(value: str) -> str:
    if not all(part.strip() for part in value.split(",")):
        raise ValueError("name at least one, and no empty one between commas")
    return value


def _check_key(key: str) -> None:
    if len(key) < _SHORTEST_KEY:
        raise ValueError(f"each key has at least {_SHORTEST_KEY} characters")
    # Clients encode other letters each in its own way, and HTTP drops spaces at the ends.
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError("a key is of ASCII letters, digits and signs, with no space at its ends")


def _check_secret(value: SecretStr) -> SecretStr:
    _check_key(value.get_secret_value())
    return value


def _check_secrets(value: SecretStr) -> SecretStr:
    for key in value.get_secret_value().split(","):
        _check_key(key.strip())
    return value


def _check_origins(value: str) -> str:
    for origin in parts(value):
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is no origin; write https://example.org, with nothing behind it, or *")
    return value


Host = Annotated[str, AfterValidator(_check_host)]
Names = Annotated[str, AfterValidator(_check_names)]
"""Comma separated."""
Key = Annotated[SecretStr, AfterValidator(_check_secret)]
Keys = Annotated[SecretStr, AfterValidator(_check_secrets)]
"""Comma separated."""
Origins = Annotated[str, AfterValidator(_check_origins)]
"""Comma separated."""
