"""Every status of the contract other than 200, each as a problem document."""

import errno
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_fakes import POISON, RELOAD_KEY, Server, encoded, picture, serving

GOOD = encoded(picture((20, 10, 60, 40)))


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server with small limits."""
    with serving(max_bytes=20_000, max_pixels=10_000, max_pictures=3, reload_key=RELOAD_KEY) as running:
        yield running


def problem(response: httpx.Response, status: int, reason: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    document = response.json()
    assert document["status"] == status and document["reason"] == reason, document
    assert document["title"] and document["detail"] and document["type"] == "about:blank"
    assert "Traceback" not in response.text and ".py" not in response.text
    return document


def parts(*files: bytes, name: str = "image") -> list:
    return [(name, (f"{number}.png", data, "image/png")) for number, data in enumerate(files)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_picture"),
        (b"not a picture at all", "not_a_picture"),
        (GOOD[: len(GOOD) // 2], "broken_picture"),
    ],
)
def test_400_not_a_picture(small: Server, data: bytes, reason: str) -> None:
    problem(small.post(data), 400, reason)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_400_multipart_cut_short(small: Server, share: float) -> None:
    request = small.client.build_request("POST", "/segment", files=parts(GOOD))
    body = request.read()
    headers = {"Content-Type": request.headers["content-type"]}
    response = small.client.post("/segment", content=body[: int(len(body) * share)], headers=headers)
    problem(response, 400, "broken_multipart")


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=other", f"; boundary={'x' * 300}"])
def test_400_wrong_boundary(small: Server, boundary: str) -> None:
    body = b"--b\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\nx\r\n--b--\r\n"
    headers = {"Content-Type": f"multipart/form-data{boundary}"}
    problem(small.client.post("/segment", content=body, headers=headers), 400, "broken_multipart")


def test_the_first_bad_picture_fails_its_request_by_its_index(small: Server) -> None:
    response = small.client.post("/segment", files=parts(GOOD, b"nonsense", GOOD[:50]))
    assert problem(response, 400, "not_a_picture")["index"] == 1
    response = small.client.post("/segment", files=parts(GOOD, GOOD, encoded(picture(size=(200, 100)))))
    assert problem(response, 413, "too_many_pixels")["index"] == 2


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer wrong", f"Basic {RELOAD_KEY}", "Bearer ü"])
def test_401_reload_without_the_key(small: Server, authorization: str | None) -> None:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    response = small.client.post("/models/reload", json={"model": "fake"}, headers=headers)
    problem(response, 401, "wrong_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_401_where_no_key_is_set(server: Server) -> None:
    response = server.client.post("/models/reload", json={"model": "x"}, headers={"Authorization": "Bearer None"})
    problem(response, 401, "no_key")


def test_404_and_405(small: Server) -> None:
    problem(small.client.get("/nothing"), 404, "not_found")
    problem(small.client.get("/segment/"), 404, "not_found")
    response = small.client.get("/segment")
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    problem(small.client.post("/readyz"), 405, "method_not_allowed")


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "application/json;q=0", "*/*;q=0", "image/png;q=x"])
def test_406(small: Server, accept: str) -> None:
    problem(small.post(GOOD, headers={"Accept": accept}), 406, "not_acceptable")


def test_408_slow_sender() -> None:
    with serving(body_timeout_ms=50) as server:
        host, port = server.client.base_url.host, server.client.base_url.port
        with socket.create_connection((host, port), timeout=30) as connection:
            connection.sendall(
                b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nhalf"
            )
            answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until the server closes
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"reason":"slow_sender"' in answer


def test_504_when_the_deadline_passes_while_the_body_arrives(small: Server) -> None:
    host, port = small.client.base_url.host, small.client.base_url.port
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n"
            b"X-Timeout-Ms: 30\r\n\r\nhalf"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b'"reason":"deadline_passed"' in answer and b"\r\nconnection: close\r\n" in answer.lower()


def test_413_declared(small: Server) -> None:
    response = small.post(b"x" * 20_001)
    problem(response, 413, "too_many_bytes")
    assert response.headers["connection"] == "close"
    assert small.post(b"x" * 20_000).status_code == 400


def test_413_sent_without_a_declared_length(small: Server) -> None:
    response = small.post(b"x" * 1000 for _ in range(30))
    problem(response, 413, "too_many_bytes")
    problem(small.post(b"x" * 10_000 for _ in range(1000)), 413, "too_many_bytes")


def test_413_before_a_careful_client_has_sent_anything(small: Server) -> None:
    host, port = small.client.base_url.host, small.client.base_url.port
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(
            b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/segment", "Content-Type: text/plain", 415),
        ("/segment?bogus=1", "Content-Type: image/png", 422),
        ("/segments", "Content-Type: image/png", 404),
    ],
)
def test_a_careful_client_that_is_refused_before_its_body_is_not_taken_to_send_it(
    small: Server, path: str, headers: str, status: int
) -> None:
    host, port = small.client.base_url.host, small.client.base_url.port
    with socket.create_connection((host, port), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\nContent-Length: 999\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and b"\r\nconnection: close\r\n" in answer.lower()


SHORTAGES = [MemoryError(), OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")]


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_503_where_the_system_has_nothing_left(
    small: Server, monkeypatch: pytest.MonkeyPatch, shortage: Exception
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise shortage

    with monkeypatch.context() as patch:
        patch.setattr("dsg.service.decode.jpeg_pixels", refuse)
        response = small.post(GOOD)
        problem(response, 503, "out_of_memory")
        assert response.headers["retry-after"] == "5"
        patch.setattr("dsg.service.decode.Image.open", refuse)
        problem(small.post(GOOD), 503, "out_of_memory")
    assert small.post(GOOD).status_code == 200


def test_pillows_readers_are_there_before_the_first_picture() -> None:
    code = (
        "from dsg.service.decode import FORMATS, guard_decoding; from PIL import Image; guard_decoding(); "
        "print(set(FORMATS) - Image.OPEN.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_413_too_many_pixels(small: Server) -> None:
    problem(small.post(encoded(picture(size=(101, 100)))), 413, "too_many_pixels")
    assert small.post(encoded(picture(size=(100, 100)))).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "image/gif", "image/svg+xml", "application/octet-stream", ""]
)
def test_415_declared_types(small: Server, kind: str) -> None:
    response = small.client.post("/segment", content=GOOD, headers={"Content-Type": kind} if kind else {})
    problem(response, 415, "unsupported_type")


def test_415_content_and_encoding(small: Server) -> None:
    problem(small.post(encoded(picture().convert("P"), "GIF")), 415, "unsupported_type")
    problem(small.post(GOOD, headers={"Content-Encoding": "gzip"}), 415, "unsupported_encoding")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("score_threshold=1.1", "wrong_parameter"),
        ("score_threshold=-0.1", "wrong_parameter"),
        ("score_threshold=nan", "wrong_parameter"),
        ("score_threshold=high", "wrong_parameter"),
        ("max_detections=0", "wrong_parameter"),
        ("max_detections=21", "wrong_parameter"),
        ("max_detections=1.5", "wrong_parameter"),
        ("mask_format=png", "wrong_parameter"),
        ("categories=red,purple", "unknown_category"),
        ("categories=", "unknown_category"),
        ("model=other", "unknown_model"),
        ("model=../fake", "unknown_model"),
        ("score_treshold=0.5", "wrong_parameter"),
        ("max_detections=3&max_detections=5", "wrong_parameter"),
        ("categories=red&categories=red", "wrong_parameter"),
    ],
)
def test_422_query(small: Server, query: str, reason: str) -> None:
    problem(small.post(GOOD, params=query), 422, reason)


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "", "0000000000000", "\u00b2"])
def test_422_timeout_header(small: Server, value: str) -> None:
    problem(small.post(GOOD, headers={"X-Timeout-Ms": value.encode()}), 422, "wrong_parameter")


def test_422_parts(small: Server) -> None:
    problem(small.client.post("/segment", files=parts(GOOD, name="photo")), 422, "wrong_part")
    problem(small.client.post("/segment", files=parts(*[GOOD] * 4)), 422, "too_many_pictures")
    response = small.client.post("/segment", files=parts(GOOD, GOOD), headers={"Accept": "image/png"})
    problem(response, 422, "one_picture")
    empty = small.client.post(
        "/segment", content=b"--b--\r\n", headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert empty.status_code in (400, 422)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 3}', b'{"model": "a", "path": "b"}'])
def test_422_reload_body(small: Server, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {RELOAD_KEY}"}
    problem(small.client.post("/models/reload", content=body, headers=headers), 422, "wrong_parameter")


def test_500_is_said_without_what_happened(small: Server) -> None:
    response = small.post(encoded(picture((0, 0, 96, 1), colour=POISON)))
    assert "stand" not in problem(response, 500, "internal")["detail"]
    assert small.post(GOOD).status_code == 200


def test_503_when_the_device_is_lost() -> None:
    with serving() as server:
        server.predictor.failure = lambda prepared: RuntimeError("CUDA error: an illegal memory access was encountered")
        problem(server.post(GOOD), 503, "unhealthy")
        problem(server.client.get("/healthz"), 503, "unhealthy")
        problem(server.client.get("/readyz"), 503, "unhealthy")
        assert server.client.head("/readyz").status_code == 503
        problem(server.post(GOOD), 503, "unhealthy")


def test_out_of_memory_is_no_lost_device() -> None:
    with serving() as server:
        server.predictor.failure = lambda prepared: RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        response = server.post(GOOD)
        problem(response, 503, "out_of_memory")
        assert int(response.headers["retry-after"]) > 0
        assert server.client.get("/healthz").status_code == 200


def test_503_while_draining() -> None:
    with serving() as server:
        server.service.drain()
        response = server.post(GOOD)
        problem(response, 503, "draining")
        assert response.headers["connection"] == "close" and int(response.headers["retry-after"]) > 0
        problem(server.client.get("/readyz"), 503, "draining")
        assert server.client.get("/healthz").status_code == 200


def test_503_while_loading() -> None:
    with serving() as server:
        server.service._warm = False
        problem(server.post(GOOD), 503, "loading")


def test_a_thousand_parts_cost_nothing(small: Server) -> None:
    one = b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\n\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with serving() as server:
        response = server.client.post("/segment", content=one * 10_000 + b"--b--\r\n", headers=headers)
        problem(response, 422, "too_many_pictures")


_WORDS = st.one_of(
    st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(["rle", "red", "0.5", "1"])
)


@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    query=st.dictionaries(
        st.one_of(
            st.sampled_from(["score_threshold", "max_detections", "mask_format", "categories", "model"]),
            st.text(max_size=8),
        ),
        _WORDS,
        max_size=4,
    )
)
def test_any_query_is_answered_or_refused(small: Server, query: dict[str, str]) -> None:
    query = {
        name.encode("utf-8", "replace").decode(): value.encode("utf-8", "replace").decode()
        for name, value in query.items()
    }
    response = small.post(GOOD, params=query)
    if response.status_code != 200:
        problem(response, 422, response.json()["reason"])


@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    body=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [b"--b", b"--b--", b"\r\n", b"\r\n\r\n", b"Content-Disposition: form-data; name=image", b"\xff", GOOD]
            ),
        ),
        max_size=8,
    ).map(b"".join)
)
def test_any_multipart_body_is_answered_or_refused(small: Server, body: bytes) -> None:
    response = small.client.post("/segment", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert response.status_code in (200, 400, 413, 415, 422), response.text


def test_a_broken_request_line_leaves_the_server_alive(small: Server) -> None:
    host, port = small.client.base_url.host, small.client.base_url.port
    for garbage in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /segment HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection((host, port), timeout=30) as connection:
            connection.sendall(garbage)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert small.client.get("/healthz").status_code == 200
