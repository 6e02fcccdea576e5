"""What /segment and the other endpoints answer when all is well."""

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from service_fakes import BLUE, CATEGORY_IDS, GREEN, Server, encoded, find_rectangles, info, picture
from starlette.requests import Request

from dsg.service.encode import Answered, coco_document, to_json
from dsg.service.query import Wanted, timeout_ms

BOX = (20, 10, 60, 40)


def three_colours() -> Image.Image:
    image = picture(BOX, size=(200, 100))
    image.paste(GREEN, (100, 20, 140, 60))
    image.paste(BLUE, (150, 50, 190, 90))
    return image


def test_one_raw_picture(server: Server) -> None:
    response = server.post(encoded(picture(BOX)))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["images"] == [{"id": 1, "file_name": "image", "width": 96, "height": 64}]
    (annotation,) = document["annotations"]
    assert annotation["bbox"] == [20, 10, 40, 30]
    assert annotation["category_id"] == CATEGORY_IDS[0]
    assert annotation["score"] == pytest.approx(0.9)
    assert (annotation["id"], annotation["image_id"], annotation["iscrowd"]) == (1, 1, 0)
    mask = coco_mask.decode(annotation["segmentation"])
    assert mask.shape == (64, 96)
    assert annotation["area"] == mask.sum()
    assert mask[12:38, 22:58].all() and not mask[:, 64:].any()
    assert document["info"]["model"] == "fake"
    assert document["info"]["hash"] == "0123abcd"
    assert document["info"]["licence"] == "Apache-2.0"
    assert document["info"]["version"] == "0.1.0"
    assert [one["id"] for one in document["categories"]] == list(CATEGORY_IDS)


def test_a_document_loads_in_pycocotools_and_loadres_takes_its_annotations(server: Server, tmp_path: Path) -> None:
    files = [("image", (f"{n}.png", encoded(three_colours()), "image/png")) for n in range(2)]
    response = server.client.post("/segment?score_threshold=0.1", files=files)
    assert response.status_code == 200, response.text
    path = tmp_path / "answer.json"
    path.write_bytes(response.content)
    truth = COCO(str(path))
    assert [one["file_name"] for one in truth.loadImgs(truth.getImgIds())] == ["0.png", "1.png"]
    assert len(truth.getAnnIds()) == 6
    results = truth.loadRes(response.json()["annotations"])
    for annotation in results.loadAnns(results.getAnnIds()):
        assert results.annToMask(annotation).sum() > 0
    for annotation in truth.loadAnns(truth.getAnnIds()):
        assert truth.annToMask(annotation).sum() == annotation["area"]


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("", [7, 90]),
        ("score_threshold=0", [7, 90, 3]),
        ("score_threshold=1", []),
        ("score_threshold=0&max_detections=1", [7]),
        ("score_threshold=0&categories=blue", [3]),
        ("score_threshold=0&categories=blue,%20red", [7, 3]),
        ("score_threshold=0&categories=blue,green&max_detections=1", [90]),
        ("categories=blue", []),
        ("model=fake", [7, 90]),
    ],
)
def test_query_parameters_select(server: Server, query: str, ids: list[int]) -> None:
    response = server.post(encoded(three_colours()), params=query)
    assert response.status_code == 200, response.text
    assert [one["category_id"] for one in response.json()["annotations"]] == ids


def test_mask_formats_agree(server: Server) -> None:
    answers = {
        kind: server.post(encoded(three_colours()), params={"mask_format": kind}).json()["annotations"]
        for kind in ("rle", "polygon", "none")
    }
    for rle, polygon, none in zip(*answers.values(), strict=True):
        assert none["segmentation"] == []
        assert rle["area"] == polygon["area"] == none["area"] > 0
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygon["segmentation"], 100, 200)))
        np.testing.assert_array_equal(drawn, coco_mask.decode(rle["segmentation"]))


@pytest.mark.parametrize("mask_format", ["rle", "polygon"])
def test_an_empty_mask_is_one_that_pycocotools_draws(mask_format: str, tmp_path: Path) -> None:
    found = find_rectangles(np.asarray(three_colours()))
    found.mask_probs[0] = 0.0
    asked = Wanted(0.0, 20, mask_format, None)
    document = coco_document([Answered("a.png", found)], asked, info(), "fake")
    path = tmp_path / "answer.json"
    path.write_bytes(to_json(document))
    truth = COCO(str(path))
    areas = [truth.annToMask(one).sum() for one in truth.loadAnns([1, 2, 3])]
    assert areas == [one["area"] for one in document["annotations"]] and areas[0] == 0 < min(areas[1:])
    results = truth.loadRes(document["annotations"])
    assert results.annToMask(results.anns[1]).shape == (100, 200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_each_format_whatever_its_declared_type(server: Server, kind: str) -> None:
    data = encoded(picture(BOX), kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    (annotation,) = server.post(data, headers={"Content-Type": "image/tiff"}).json()["annotations"]
    np.testing.assert_allclose(annotation["bbox"], [20, 10, 40, 30], atol=2)


def test_exif_orientation_turns_the_coordinates(server: Server) -> None:
    image = picture((0, 0, 30, 16), size=(96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what lies top left stands top right
    response = server.post(encoded(image, "JPEG", exif=exif, quality=95, subsampling=0))
    document = response.json()
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (64, 96)
    (annotation,) = document["annotations"]
    np.testing.assert_allclose(annotation["bbox"], [48, 0, 16, 30], atol=1)
    assert annotation["segmentation"]["size"] == [96, 64]


def test_headers_say_where_the_time_went_and_which_request_it_was(server: Server) -> None:
    response = server.post(encoded(picture()), headers={"X-Request-Id": "photo-7", "X-Timeout-Ms": "30000"})
    assert response.headers["x-request-id"] == "photo-7"
    stages = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
    assert [name for name, _ in stages] == ["decode", "queue", "infer", "encode"]
    assert all(float(value) >= 0 for _, value in stages)
    made_up = server.post(encoded(picture()), headers={"X-Request-Id": "a\tb"}).headers["x-request-id"]
    assert len(made_up) == 32


def test_the_stages_of_a_request_follow_one_another(server: Server) -> None:
    shapes = [encoded(picture(BOX, size=(96, height))) for height in (64, 96, 128)]

    def spare_ms(number: int) -> float:
        files = [("image", (f"{one}.png", data, "image/png")) for one, data in enumerate(shapes[: 1 + number % 3])]
        began = time.perf_counter()
        response = server.client.post("/segment", files=files)
        took_ms = 1000 * (time.perf_counter() - began)
        parts = response.headers["server-timing"].split(", ")
        return took_ms - sum(float(part.partition(";dur=")[2]) - 0.05 for part in parts)  # as it is rounded

    with ThreadPoolExecutor(16) as clients:
        assert min(clients.map(spare_ms, range(150))) > 0


@pytest.mark.parametrize("value", ["1000000", "1000000000", "9" * 5000, "0" * 20 + "60000"])
def test_a_longer_timeout_than_the_servers_is_the_servers(server: Server, value: str) -> None:
    assert server.post(encoded(picture()), headers={"X-Timeout-Ms": value}).status_code == 200
    request = Request({"type": "http", "headers": [(b"x-timeout-ms", value.encode())]})
    assert timeout_ms(request, 60_000) == 60_000


def test_a_picture_as_answer(server: Server) -> None:
    for query in ("", "?mask_format=none"):
        response = server.client.post(
            f"/segment{query}",
            content=encoded(picture(BOX)),
            headers={"Content-Type": "image/png", "Accept": "image/png"},
        )
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "image/png"
        drawn = np.array(Image.open(io.BytesIO(response.content)))
        assert drawn.shape == (64, 96, 3)
        assert tuple(drawn[5, 90]) == (128, 128, 128)  # outside: as it was
        assert tuple(drawn[30, 40]) != (255, 0, 0)  # inside: coloured


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("image/*", "image/png"),
        ("image/png, application/json;q=0.9", "image/png"),
        ("image/png;q=0.1, application/json", "application/json"),
        ("*/*;q=0.8, image/png;q=0", "application/json"),
        ("text/html, image/webp, */*;q=0.1", "application/json"),
        ("image/png;q=nan, */*;q=0.1", "application/json"),
    ],
)
def test_accept_is_negotiated(server: Server, accept: str, kind: str) -> None:
    response = server.post(encoded(picture(BOX)), headers={"Accept": accept})
    assert response.headers["content-type"] == kind


def test_accept_in_several_lines_is_one_list(server: Server) -> None:
    headers = [("accept", "text/html"), ("accept", "image/png"), ("content-type", "image/png")]
    response = server.client.post("/segment", content=encoded(picture(BOX)), headers=headers)
    assert response.headers["content-type"] == "image/png"


def test_probes_models_page_and_documentation(server: Server) -> None:
    get = server.client.get
    assert get("/healthz").json() == {"status": "ok"}
    assert get("/readyz").json() == {"status": "ready"}
    (model,) = get("/models").json()["models"]
    assert model["name"] == "fake" and model["default"] and model["max_detections"] == 20
    assert [one["name"] for one in model["categories"]] == ["red", "green", "blue"]
    page = get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text  # nothing from outside
    assert get("/docs").status_code == 200
    document = get("/openapi.json").json()
    answers = document["paths"]["/segment"]["post"]["responses"]
    assert "get" in document["paths"]["/readyz"] and "503" in document["paths"]["/readyz"]["get"]["responses"]
    assert {"200", "400", "406", "408", "413", "415", "422", "429", "500", "503", "504"} <= set(answers)
    assert "application/problem+json" in answers["422"]["content"]
    assert "multipart/form-data" in document["paths"]["/segment"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
def test_head_answers_like_get_without_the_body(server: Server, path: str) -> None:
    got, head = server.client.get(path), server.client.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b"" != got.content
    own = {"date", "x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in own} == {
        k: v for k, v in got.headers.items() if k not in own
    }
    refused = server.client.post(path)
    assert refused.status_code == 405 and set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_metrics_count_what_was_asked(server: Server) -> None:
    labels = {"route": "/segment", "method": "POST", "status": "200"}
    before = server.metric("dsg_request_duration_seconds_count", **labels)
    pictures = server.metric("dsg_batched_pictures_total", shape="64x96")
    server.post(encoded(picture(BOX)))
    server.await_metric("dsg_request_duration_seconds_count", before + 1, **labels)
    assert server.metric("dsg_batched_pictures_total", shape="64x96") == pictures + 1
    assert server.metric("dsg_stage_duration_seconds_count", stage="infer") >= 1
    text = server.client.get("/metrics").text
    assert 'dsg_model_info{hash="0123abcd",licence="Apache-2.0",name="fake",version="0.1.0"} 1.0' in text


def test_answers_are_plain_json(server: Server) -> None:
    response = server.post(encoded(three_colours()))
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), response.text
    document = json.loads(response.content, parse_constant=lambda name: pytest.fail(name))
    assert len(document["annotations"]) == 2
