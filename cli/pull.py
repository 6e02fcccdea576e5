"""`dsg pull`: one file of weights from the web, kept only if its hash is the expected one."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer

from dsg.cli.progress import progress

_CHUNK = 1 << 20
_SILENCE_S = 30.0
"""Seconds without a byte after which the server counts as gone."""
_IN_NAME = re.compile(r"[-_]([0-9a-f]{6,64})\.[A-Za-z0-9.]+$")
"""The start of a SHA-256 in a file's name: maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth, model_final_f10217.pkl."""


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Redirects lead to other web pages, not to files or FTP servers."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise ValueError(f"{req.full_url} leads to {newurl}, which is no web address; get the file another way")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def pull(
    url: Annotated[str, typer.Argument(help="Address of the file, http or https.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="the address's name, here")] = None,
    sha256: Annotated[
        str | None,
        typer.Option(help="SHA-256 of the file, or how it begins.", show_default="the one in the file's name"),
    ] = None,
) -> None:
    """Fetch a file of weights, such as one that `dsg models` knows, and check its hash.

    What arrives with another hash, or only in part, is not kept; a file that is there already is not touched.
    """
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    expected = _expected(url, name, sha256)
    target = out or Path(name)
    if not target.name or target.is_dir():
        raise ValueError(f"{target or url}: a folder; say with --out which file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} in")
    if target.exists():
        found = _hash_of(target)
        if not found.startswith(expected):
            raise ValueError(
                f"{target} is there, with another hash ({found[:12]}...); remove it, or choose another --out"
            )
        typer.echo(f"{target}: there already, with the expected hash")
        return
    with progress("MiB") as advance:
        found = fetch(url, target, expected, advance)
    typer.echo(f"{target}: {target.stat().st_size / 1e6:.1f} MB, sha256 {found}")


def fetch(
    url: str,
    target: Path,
    expected: str,
    advance: Callable[[int, int], None] = lambda done, total: None,
    silence_s: float = _SILENCE_S,
) -> str:
    """Download to `target` in one step: the whole file with the right hash, or nothing.

    Args:
        expected: how its SHA-256 begins, in hex.
        advance: told (MiB so far, MiB in all) now and then.
        silence_s: seconds without a byte after which the server counts as gone.

    Returns:
        the SHA-256.

    Raises:
        ValueError: no such file there, a server that does not answer, another hash.
    """
    from dsg.model.network.atomic import replacing

    digest, done = hashlib.sha256(), 0
    opener = urllib.request.build_opener(_WebOnly)
    request = urllib.request.Request(url, headers={"User-Agent": "dsg"})
    try:
        with opener.open(request, timeout=silence_s) as answer, replacing(target) as temporary:
            total = int(answer.headers.get("Content-Length") or 0)
            with open(temporary, "wb") as file:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    advance(done >> 20, max(total, done) >> 20)
            if done < total:
                raise ValueError(f"{url}: the connection ended after {done} of {total} bytes; try again")
            if not digest.hexdigest().startswith(expected):
                raise ValueError(
                    f"{url}: its sha256 is {digest.hexdigest()}, not {expected}...; it is another file than expected"
                )
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: no answer ({getattr(error, 'reason', error)}); try again") from None
    return digest.hexdigest()


def _expected(url: str, name: str, sha256: str | None) -> str:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise ValueError(f"{url} is no web address; it begins with https:// or http://")
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-f]{6,64}", sha256.lower()):
            raise ValueError(f"--sha256 must be 6 to 64 hexadecimal digits, got {sha256!r}")
        return sha256.lower()
    in_name = _IN_NAME.search(name)
    if in_name is None:
        raise ValueError(f"{name or url} does not say its hash; pin it with --sha256")
    return in_name[1]


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
