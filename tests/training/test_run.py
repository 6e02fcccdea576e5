"""Whole runs with the real network on a few small pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from dsg.model import load
from dsg.model.data.records import DataError
from dsg.model.network.checkpoint import read_info
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.training.errors import TrainingError
from dsg.model.training.recipe_file import load_recipe
from dsg.model.training.run import train

SMALL = [
    "overrides.channels=32",
    "overrides.box_head_width=64",
    "overrides.roi_samples=64",
    "overrides.proposals_train=100",
    "overrides.rpn_candidates_train=100",
    "overrides.proposals=50",
    "overrides.rpn_candidates=50",
    "overrides.frozen_stages=12",  # the early blocks are what costs time
    "augment.short_sides=[96]",
    "augment.short_side_range=false",
    "augment.long_side=96",
    "augment.color_jitter=0",
    "batch.images=2",
    "batch.workers=0",
    "optimizer.backbone_lr_factor=1",
    "predict.short_side=96",
    "predict.long_side=96",
    "validation.every=0",
]


def small_recipe(*settings):
    return load_recipe("fast", [*SMALL, *settings])


@pytest.fixture
def quiet():
    return Console(quiet=True)


@pytest.fixture
def body(tmp_path):
    """A file of weights for the lite backbone."""
    path = tmp_path / "body.safetensors"
    save_file(EfficientNetLite(0).state_dict(), path)
    return path


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_pictures_are_learnt(shapes, body, tmp_path, capsys):
    """Loss falls, AP gets good, and the file that comes out finds the shapes under the ids of the training
    file."""
    file = shapes(tmp_path / "set", 2, licences=["Attribution-NonCommercial License", "CC BY 4.0"])
    recipe = small_recipe(
        "overrides.frozen_stages=16",
        "schedule.iterations=65",
        "schedule.warmup_iterations=10",
        "schedule.final_factor=0.1",
        "optimizer.lr=5e-3",
        "augment.horizontal_flip=0",
        "ema.decay=0.9",
        "run.log_every=5",
        "predict.precision=0.9",
    )
    best = train(recipe, [file], out=tmp_path / "shapes_run", val=[file], init=str(body), device="cpu")
    assert best == tmp_path / "shapes_run" / "best.safetensors"

    lines = metrics_of(tmp_path / "shapes_run")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert {"loss_objectness", "loss_proposal_mask", "loss_mask", "grad_norm"} <= set(lines[0])
    final = lines[-1]
    assert final["kind"] == "validation" and final["iteration"] == 65
    assert final["segm/AP"] > 0.5 and final["bbox/AP"] > 0.5

    predictor = load(best, device="cpu")
    info = predictor.info
    assert (info.name, info.preset) == ("shapes_run", "dsg_lite0_fpn")
    assert [(category.id, category.name) for category in info.categories] == [(7, "disc"), (3, "bar")]
    assert (info.resize.short_side, info.resize.long_side, info.max_detections) == (96, 96, 100)
    assert "1 of 2 training pictures are under NonCommercial licences" in info.licence
    assert len(info.class_thresholds) == 2 and info.class_precision == 0.9
    shown = predictor.predict([file.parent / "images" / f"{n}.png" for n in (1, 2)])
    assert sum(map(len, shown)) <= 4 / 0.9 and {1, 2} <= set(shown[0].labels.tolist() + shown[1].labels.tolist())
    assert info.notes["iterations"] == "65" and info.notes["started_from"] == "body.safetensors"
    found = predictor.predict([file.parent / "images" / "1.png"], score_threshold=0.3)[0]
    results = found.to_coco(1, info.category_ids)
    truth = {a["category_id"]: a["bbox"] for a in json.loads(file.read_text())["annotations"] if a["image_id"] == 1}
    for category_id, box in truth.items():
        one = next(result for result in results if result["category_id"] == category_id)
        assert np.abs(np.array(one["bbox"]) - box).max() < 12

    said = capsys.readouterr().err
    assert "init: backbone from body.safetensors" in said
    assert f"lowest score that is shown by default: {info.threshold_in_words}" in said
    assert "iteration 10/65  loss" in said and "finished: 65 of 65 iterations" in said


def test_a_resumed_run_equals_a_straight_one(shapes, body, tmp_path, quiet):
    """Real network, real loader with random flips and sizes: one step and one more are two steps, bit for
    bit."""
    file = shapes(tmp_path / "set", 3, size=64)
    settings = ["schedule.iterations=2", "augment.short_sides=[48, 64]", "augment.copy_paste=0.5", "ema.decay=0.9"]
    train(small_recipe(*settings), [file], out=tmp_path / "straight", device="cpu", console=quiet, init=str(body))
    one_step = small_recipe(*settings, "run.max_seconds=1e-9")
    stopped = train(one_step, [file], out=tmp_path / "parts", device="cpu", console=quiet, init=str(body))
    assert stopped == tmp_path / "parts" / "last"
    torch.manual_seed(77)
    with pytest.raises(TrainingError, match=r"parts holds a run already: give --resume"):
        train(small_recipe(*settings), [file], out=tmp_path / "parts", device="cpu", console=quiet)
    body.unlink()  # what a run began with is not needed to go on
    again = {"device": "cpu", "resume": True, "init": str(body), "console": quiet}
    train(small_recipe(*settings), [file], out=tmp_path / "parts", **again)

    straight = torch.load(tmp_path / "straight" / "last", weights_only=True)
    parts = torch.load(tmp_path / "parts" / "last", weights_only=True)
    assert straight["iteration"] == parts["iteration"] == 2
    for name, tensor in straight["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    for name, tensor in straight["ema"]["module"].items():
        assert torch.equal(tensor, parts["ema"]["module"][name]), name
    assert straight["best_ap"] == parts["best_ap"]
    assert read_info(tmp_path / "parts" / "best.safetensors").notes["started_from"] == "body.safetensors"


def test_other_data_are_not_resumed(shapes, tmp_path, quiet):
    first, second = shapes(tmp_path / "a", 3, size=64), shapes(tmp_path / "b", 4, size=64)
    recipe = small_recipe("schedule.iterations=2", "run.max_seconds=1e-9")
    train(recipe, [first], out=tmp_path / "out", device="cpu", console=quiet)
    with pytest.raises(TrainingError, match=r"training data are not those of"):
        train(recipe, [second], out=tmp_path / "out", device="cpu", resume=True, console=quiet)


def test_fine_tuning_for_other_classes_leaves_the_last_layers_fresh(shapes, tmp_path, capsys):
    recipe = small_recipe("schedule.iterations=1")
    file = shapes(tmp_path / "a", 2, size=64)
    first = train(recipe, [file], out=tmp_path / "first", val=[file], device="cpu")
    document = json.loads(file.read_text())
    document["categories"] = [{"id": 12, "name": "thing"}]
    document["annotations"] = [{**a, "category_id": 12} for a in document["annotations"]]
    other = file.with_name("things.json")
    other.write_text(json.dumps(document))
    capsys.readouterr()
    tuned = train(recipe, [other], out=tmp_path / "second", val=[other], init=str(first), device="cpu")
    said = capsys.readouterr().err
    assert "from best.safetensors; fresh, since absent there or of another shape: " in said
    assert load(tuned, device="cpu").info.category_ids == [12]
    assert load(tuned, device="cpu").info.notes["started_from"].startswith("first")


def test_own_network_from_a_python_file(shapes, tmp_path, quiet):
    """A network of the project's parts comes out as a checkpoint like any other."""
    file = shapes(tmp_path / "set", 2, size=64)
    config = tmp_path / "own.py"
    config.write_text(
        "from dsg.model import build as preset\n"
        "def build(num_classes):\n"
        "    return preset('mask_rcnn_lite0_fpn', num_classes, channels=16, box_head_width=32, max_detections=7)\n"
    )
    settings = ["schedule.iterations=1", "batch.images=2", "batch.workers=0", "augment.short_sides=[64, 65]"]
    recipe = load_recipe(config, settings)
    best = train(recipe, [file], out=tmp_path / "out", val=[file], device="cpu", console=quiet)
    info = load(best, device="cpu").info
    assert (info.preset, info.max_detections) == ("mask_rcnn_lite0_fpn", 7)
    assert info.overrides == {"channels": 16, "box_head_width": 32, "max_detections": 7}

    config.write_text("def build(num_classes):\n    return 'no module'\n")
    with pytest.raises(TrainingError, match=r"own.py: build\(num_classes\) gave str; it must return a torch nn.Module"):
        train(recipe, [file], out=tmp_path / "out2", val=[file], device="cpu", console=quiet)


def test_own_network_of_other_parts(shapes, tmp_path, quiet):
    """What no preset builds is kept as its tensors, under the same description."""
    file = shapes(tmp_path / "set", 2, size=64)
    config = tmp_path / "strange.py"
    config.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('shared', {str(Path(__file__).with_name('conftest.py'))!r})\n"
        "shared = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(shared)\n"
        "def build(num_classes):\n"
        "    return shared.TinyDetector()\n"
    )
    recipe = load_recipe(config, ["schedule.iterations=1", "batch.images=2", "batch.workers=0", "run.half=false"])
    best = train(recipe, [file], out=tmp_path / "out", val=[file], device="cpu", console=quiet)
    with safe_open(best, framework="pt") as tensors:
        description = json.loads(tensors.metadata()["own_network"])
        assert set(tensors.keys()) >= {"head.weight", "head.bias"}
    assert description["preset"] == "strange.py"
    assert [category["id"] for category in description["categories"]] == [7, 3]


def test_what_cannot_start_says_so_in_one_line(shapes, tmp_path, quiet):
    file = shapes(tmp_path / "set", 2, size=64)
    recipe = small_recipe("schedule.iterations=1")

    def refused(error, message, *arguments, **options):
        with pytest.raises(error, match=message) as caught:
            train(recipe, *arguments, out=tmp_path / "out", console=quiet, **{"device": "cpu", **options})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused(TrainingError, "no training data: give --data", [])
    refused(DataError, "gone.json", [tmp_path / "gone.json"])
    refused(TrainingError, "--data: 2 image folders for 1 annotation files", [file], ["a", "b"])
    refused(TrainingError, r"--init nothing: neither a file nor a name", [file], init="nothing")
    refused(ValueError, "broken", [file], init=str(_broken(tmp_path)))
    refused(TrainingError, r"--resume: .*last does not exist", [file], resume=True)
    if not torch.cuda.is_available():
        refused(TrainingError, "PyTorch sees no GPU: use device cpu", [file], device="cuda")
    refused(ValueError, "unknown device 'gpu'; use cpu, cuda or cuda:N", [file], device="gpu")
    recipe = small_recipe("model=htc_lite0_fpn", "overrides.semantic=stuff")
    refused(TrainingError, "give their folder as batch.stuff_maps", [file])
    recipe = small_recipe("model=htc_lite0_fpn", "overrides.semantic=stuff", f"batch.stuff_maps={tmp_path}")
    refused(DataError, "no such map", [file])
    recipe = small_recipe("schedule.iterations=1")
    document = json.loads(file.read_text())
    document["categories"] = [{"id": 7, "name": "ring"}, {"id": 3, "name": "rod"}]
    other = file.with_name("other.json")
    other.write_text(json.dumps(document))
    refused(ValueError, r"knows disc, bar, the annotations ring, rod: no name in common", [file], val=[other])


def test_a_picture_that_cannot_be_read_is_named(shapes, tmp_path, quiet):
    file = shapes(tmp_path / "set", 2, size=64)
    Image.new("RGB", (10, 10)).save(file.parent / "images" / "2.png")
    with pytest.raises(DataError, match=r"2.png: is 10 x 10 .*annotations say 64 x 64"):
        train(small_recipe("schedule.iterations=1"), [file], out=tmp_path / "out", val=[file], console=quiet)


def _broken(folder):
    path = folder / "broken.safetensors"
    path.write_bytes(b"no tensors")
    return path


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_on_a_gpu(precision, shapes, body, tmp_path, quiet):
    """Mixed precision, channels-last, workers: shapes are learnt, and a stopped run goes on."""
    file = shapes(tmp_path / "set", 4)
    settings = [
        "schedule.iterations=80",
        "schedule.warmup_iterations=10",
        "optimizer.lr=2e-3",
        "ema.decay=0.9",
        "batch.images=4",
        "batch.accumulate=2",
        "batch.workers=2",
        f"run.precision={precision}",
    ]
    options = {"out": tmp_path / "out", "val": [file], "device": "cuda", "console": quiet}
    first = train(small_recipe(*settings, "run.max_seconds=1"), [file], init=str(body), **options)
    assert first.name == "last"
    best = train(small_recipe(*settings), [file], resume=True, **options)
    final = metrics_of(tmp_path / "out")[-1]
    assert final["iteration"] == 80 and final["segm/AP"] > 0.5
    assert load(best, device="cuda").info.notes["iterations"] == "80"
