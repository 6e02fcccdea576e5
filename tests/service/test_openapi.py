"""The OpenAPI document: complete, true, and of use to whoever generates a client from it."""

from pathlib import Path

import jsonschema_rs
import pytest
from pycocotools import mask
from service_fakes import Server

from dsg.service.openapi import REASONS


def test_every_answer_has_an_example(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                for kind, content in answer["content"].items():
                    if kind != "image/png":
                        assert "example" in content or content.get("examples"), (path, method, status, kind)
    shown = document["paths"]["/segment"]["post"]["responses"]["429"]["content"]["application/problem+json"]
    assert set(shown["examples"]) == set(REASONS[429])
    assert "Retry-After" in document["paths"]["/segment"]["post"]["responses"]["429"]["headers"]


def test_the_example_of_an_answer_is_one(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    answer = document["paths"]["/segment"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    jsonschema_rs.validate({**document["components"]["schemas"]["CocoDocument"]}, answer)
    (annotation,) = answer["annotations"]
    (image,) = answer["images"]
    segmentation = annotation["segmentation"]
    assert segmentation["size"] == [image["height"], image["width"]]
    pixels = mask.decode(segmentation)
    rows, columns = pixels.nonzero()
    box = [columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]
    assert (int(pixels.sum()), box) == (annotation["area"], annotation["bbox"])


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/models"])
def test_answers_for_operators_are_as_the_document_says(server: Server, path: str) -> None:
    document = server.client.get("/openapi.json").json()
    content = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
    schema = {**content["schema"], "components": document["components"]}
    answer = server.client.get(path).json()
    for good in (answer, content["example"]):
        jsonschema_rs.validate(schema, good)
    assert answer.keys() == content["example"].keys()
    answer.pop("status", None)
    if answer:
        answer["models"][0].pop("max_detections")
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(schema, answer)


def test_what_any_request_may_be_refused_with_is_at_every_endpoint(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"400", "408", "431"} <= operation["responses"].keys(), path
            reads_a_body = path in ("/segment", "/models/reload")
            assert ("X-Request-Id" in operation["responses"]["408"]["headers"]) == reads_a_body
    healthz = document["paths"]["/healthz"]["get"]["responses"]["503"]["content"]["application/problem+json"]
    assert healthz["examples"].keys() == {"unhealthy"}


def test_parameters_may_be_left_out_and_are_never_null(server: Server) -> None:
    segment = server.client.get("/openapi.json").json()["paths"]["/segment"]["post"]
    kinds = {one["name"]: one["schema"]["type"] for one in segment["parameters"]}
    expected = {"score_threshold": "number", "max_detections": "integer", "categories": "string", "model": "string"}
    assert kinds.items() >= expected.items() and not any(one.get("required") for one in segment["parameters"])


def test_every_reason_and_metric_is_in_the_documents(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text(encoding="utf-8")
    for status, reasons in REASONS.items():
        (row,) = [line for line in page.splitlines() if line.startswith("| ") and f" {status}" in line.split("|")[1]]
        assert not [reason for reason in reasons if f"`{reason}`" not in row], status
    lines = server.client.get("/metrics").text.splitlines()
    types = [line.split()[2] for line in lines if line.startswith("# TYPE dsg_")]
    names = {name for name in types if not name.endswith("_created")}
    assert len(names) > 20 and not [name for name in names if f"`{name}" not in page]
