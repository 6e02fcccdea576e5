"""The service with a real checkpoint and the real Predictor: nothing of it is faked here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from service_fakes import encoded, serving

from dsg.model import build, load
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint
from dsg.service.models import load_predictor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    info = CheckpointInfo(
        name="tiny",
        preset="dsg_lite0_fpn",
        overrides={"proposals": 50, "max_detections": 10},
        categories=(Category(18, "dog"), Category(1, "person")),
        resize=Resize(96, 128),
        score_threshold=0.0,
        max_detections=10,
        licence="Apache-2.0",
    )
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_checkpoint(path, build(info.preset, len(info.categories), **info.overrides), info)
    return path


def test_served_answers_are_the_predictors(checkpoint: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((120, 160), (160, 120), (120, 160))]
    files = [("image", (f"{n}.png", encoded(Image.fromarray(p)), "image/png")) for n, p in enumerate(pictures)]
    predictor = load(checkpoint, "cpu")
    with serving(load_predictor, model="tiny", model_dir=checkpoint.parent, device="cpu") as server:
        response = server.client.post("/segment", files=files)
        assert response.status_code == 200, response.text
        document = response.json()
        (model,) = server.client.get("/models").json()["models"]
    assert model["name"] == "tiny" and model["hash"] == predictor.info.hash == document["info"]["hash"]
    assert [one["name"] for one in document["categories"]] == ["dog", "person"]
    assert len(document["annotations"]) > 0
    expected = [
        one
        for image_id, found in enumerate(predictor.predict(pictures), 1)
        for one in found.to_coco(image_id, predictor.info.category_ids)
    ]
    for served, own in zip(document["annotations"], expected, strict=True):
        assert (served["image_id"], served["category_id"]) == (own["image_id"], own["category_id"])
        assert served["category_id"] in (18, 1)
        assert served["score"] == pytest.approx(own["score"], abs=1e-5)
        np.testing.assert_allclose(served["bbox"], own["bbox"], atol=1e-2)
        assert served["segmentation"]["size"] == own["segmentation"]["size"]
