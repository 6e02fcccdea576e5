"""`dsg pull` from a real server on this machine."""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dsg.cli.pull import fetch

CONTENT = bytes(range(256)) * 5000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Pages(BaseHTTPRequestHandler):
    """The file, the file cut off, redirects, and nothing."""

    def do_GET(self) -> None:
        page = self.path.rpartition("/")[0]
        if page == "/moved":
            self.answer(302, b"", Location=f"/whole/w-{HASH[:8]}.pth")
        elif page == "/stolen":
            self.answer(302, b"", Location="ftp://127.0.0.1/etc/passwd")
        elif page == "/cut":
            self.answer(200, CONTENT[:1000], length=len(CONTENT))
        elif page == "/whole":
            self.answer(200, CONTENT)
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_the_hash_in_the_name_or_on_the_command_line_is_checked(server: str, command: Callable, tmp_path: Path) -> None:
    out = tmp_path / "weights.pth"
    for url, options in (
        (f"{server}/whole/w-{HASH[:8]}.pth", []),
        (f"{server}/moved/model_final_{HASH[:6]}.pkl", []),
        (f"{server}/whole/w.pth", ["--sha256", HASH]),
    ):
        ran = command("pull", url, "--out", out, *options)
        assert ran.code == 0 and HASH in ran.out, ran.err
        assert out.read_bytes() == CONTENT
        out.unlink()


def test_a_file_that_is_there_is_kept(server: str, command: Callable, tmp_path: Path) -> None:
    out = tmp_path / "weights.pth"
    out.write_bytes(CONTENT)
    assert "there already" in command("pull", f"{server}/none/w-{HASH[:8]}.pth", "--out", out).out
    out.write_bytes(b"mine")
    ran = command("pull", f"{server}/whole/w-{HASH[:8]}.pth", "--out", out)
    assert ran.code == 2 and "another hash" in ran.err and out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("page", "options", "says"),
    [
        ("/whole/w-00000000.pth", [], "another file than expected"),
        (f"/cut/w-{HASH[:8]}.pth", [], "of 1280000 bytes"),
        (f"/none/w-{HASH[:8]}.pth", [], "404"),
        (f"/stolen/w-{HASH[:8]}.pth", [], "no web address"),
        ("/whole/w.pth", [], "--sha256"),
        ("/whole/w.pth", ["--sha256", "xyz"], "hexadecimal"),
    ],
)
def test_what_is_not_right_is_not_kept(
    page: str, options: list[str], says: str, server: str, command: Callable, tmp_path: Path
) -> None:
    ran = command("pull", server + page, "--out", tmp_path / "weights.pth", *options)
    assert ran.code == 2 and says in ran.err and ran.err.splitlines()[-1].startswith("dsg: error: ")
    assert list(tmp_path.iterdir()) == []


def test_addresses_that_are_none(command: Callable, tmp_path: Path) -> None:
    for url in ("file:///etc/passwd", "weights.pth", "ftp://host/w-12345678.pth"):
        ran = command("pull", url, "--out", tmp_path / "w")
        assert ran.code == 2 and "no web address" in ran.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/w-12345678.pth"
        assert "no answer" in command("pull", closed, "--out", tmp_path / "w").err


def test_a_server_that_falls_silent_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ValueError, match="no answer"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/w", tmp_path / "w", "00", silence_s=0.1)
    assert list(tmp_path.iterdir()) == []
