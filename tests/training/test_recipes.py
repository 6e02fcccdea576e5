"""Recipes: every shipped one loads, and wrong keys and values are refused in one line that helps."""

import re
from pathlib import Path

import pytest

from dsg.model.network.presets import preset_config
from dsg.model.training import config
from dsg.model.training.config import BatchConfig, Recipe, ScheduleConfig, ValidationConfig
from dsg.model.training.recipe_file import keys, load_recipe, recipes, to_table


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    preset_config(recipe.model, 3, max_detections=recipe.predict.max_detections, **recipe.overrides)
    assert to_table(recipe)["optimizer"]["lr"] == recipe.optimizer.lr


def test_shipped_names():
    assert recipes() == [
        "coco_lite0",
        "compare_nuclei",
        "compare_organoids",
        "fast",
        "nuclei_lite0",
        "paper_1x",
        "paper_20e",
        "paper_2x",
        "paper_multiscale",
        "systems_organoids",
    ]


def test_paper_recipes_hold_the_papers_numbers():
    one, two, twenty = (load_recipe(name) for name in ("paper_1x", "paper_2x", "paper_20e"))
    for recipe in (one, two, twenty):
        assert (recipe.model, recipe.batch.images) == ("dsg_r50_fpn", 16)
        optimizer = recipe.optimizer
        assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (
            "sgd",
            0.02,
            0.9,
            1e-4,
        )
        assert (optimizer.bias_lr_factor, optimizer.bias_weight_decay) == (2.0, 0.0)
        assert (recipe.augment.short_sides, recipe.augment.long_side) == ((800,), 1333)
        assert recipe.augment.horizontal_flip == 0.5
        assert recipe.predict.eval_score_threshold == 0.001
        assert recipe.schedule.warmup_iterations == 500
        assert recipe.schedule.warmup_factor == pytest.approx(1 / 3)
    assert (one.schedule.iterations, one.schedule.steps) == (90_000, (60_000, 80_000))
    assert (two.schedule.iterations, two.schedule.steps) == (180_000, (120_000, 160_000))
    assert (twenty.schedule.epochs, twenty.schedule.steps) == (20, (16, 19))


def test_the_largest_models_are_trained_at_many_scales():
    recipe = load_recipe("paper_multiscale")
    augment = recipe.augment
    assert (augment.short_sides, augment.short_side_range, augment.long_side) == ((400, 1400), True, 1600)
    assert (recipe.optimizer.clip_norm, recipe.schedule.epochs, recipe.schedule.steps) == (35, 20, (16, 19))


def test_settings_are_typed():
    recipe = load_recipe(
        "fast",
        [
            "model=mask_rcnn_lite0_fpn",
            "optimizer.lr=1",
            "augment.short_sides=[300, 400]",
            "overrides.proposals=50",
            "run.half=false",
            "optimizer.kind = sgd",
        ],
    )
    assert recipe.model == "mask_rcnn_lite0_fpn"
    assert recipe.optimizer.lr == 1.0 and isinstance(recipe.optimizer.lr, float)
    assert recipe.augment.short_sides == (300, 400)
    assert recipe.overrides == {"proposals": 50}
    assert recipe.run.half is False
    assert recipe.optimizer.kind == "sgd"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", r"--set optimizer.lrr=1: unknown key optimizer.lrr: did you mean optimizer.lr"),
        ("lr=1", r"unknown key lr: did you mean .*optimizer.lr"),
        ("overrides.proposal=5", r"did you mean overrides.proposals"),
        ("optimizer.lr", r"--set optimizer.lr: write key=value"),
        ("optimizer.lr=quick", r"--set: optimizer.lr is 'quick'; it must be a number"),
        ("batch.images=7.5", r"batch.images is 7.5; it must be a whole number"),
        ("run.half=1", r"run.half is 1; it must be true or false"),
        ("optimizer.kind=adam", r"did you mean adamw\? choose sgd or adamw"),
        ("optimizer=sgd", r"unknown key optimizer|it is a section"),
        ("augment.short_sides=640", r"augment.short_sides is 640; it must be a list"),
        ("augment.scale_range=[1]", r"augment.scale_range is \[1\]; it must be a list of 2"),
        ("batch.repeat_below=3.0", r"batch.repeat_below is 3.0; it is a share of the pictures, 0 to 1"),
        ("batch.accumulate=3", r"batch.images = 8 is no multiple of batch.accumulate = 3"),
        ("model=dsg_r50", r"unknown preset 'dsg_r50'"),
        ("overrides.mrpn=false", r"need mrpn=True"),
        (
            "overrides.max_detections=5",
            r"unknown key overrides.max_detections: did you mean predict.max_detections",
        ),
        ("build_file=x.py", r"unknown key build_file"),
        ("nonsense=1", r"unknown key nonsense: sections are name, model, overrides, augment, optimizer"),
        ("run.zzzzzzzzzzzz=1", r"unknown key run.zzzzzzzzzzzz: keys are run.seed, run.precision"),
        ("run.nonsense=1", r"unknown key run.nonsense: did you mean run.seed"),
    ],
)
def test_wrong_settings_are_one_line(setting, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe("fast", [setting])
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_near_ones():
    with pytest.raises(ValueError, match=r"no recipe 'paper_1': did you mean paper_1x"):
        load_recipe("paper_1")
    with pytest.raises(ValueError, match=r"no recipe file .*gone.toml"):
        load_recipe("gone.toml")


def test_own_toml_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "mask_rcnn_lite2_fpn"\n[schedule]\nepochs = 3\nsteps = [2]\n')
    recipe = load_recipe(file)
    assert (recipe.name, recipe.schedule.epochs, recipe.batch) == ("mine", 3, BatchConfig())
    file.write_text("[batch]\nimage = 4\n")
    with pytest.raises(ValueError, match=r"recipe mine.toml: unknown key batch.image: did you mean batch.images"):
        load_recipe(file)
    file.write_text("model = \n")
    with pytest.raises(ValueError, match=r"mine.toml: not readable as TOML"):
        load_recipe(file)


def test_python_file_builds_the_network_and_names_its_recipe(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text("raise RuntimeError('reading a config must not run it')\n")
    with pytest.raises(ValueError, match=r"defines no function build"):
        load_recipe(file)
    file.write_text("recipe = 'paper_20e'\n\ndef build(num_classes):\n    raise RuntimeError\n")
    recipe = load_recipe(file, ["batch.images=2"])
    assert (recipe.name, recipe.build_file, recipe.schedule.epochs, recipe.batch.images) == (
        "tiny",
        file,
        20,
        2,
    )
    file.write_text("def build(num_classes):\n    raise RuntimeError\n")
    assert load_recipe(file).optimizer == load_recipe("fast").optimizer
    file.write_text("recipe = 1\ndef build(n): ...\n")
    with pytest.raises(ValueError, match=r"recipe must be a text"):
        load_recipe(file)


def test_fields_that_contradict_each_other():
    with pytest.raises(ValueError, match="set one of them"):
        ScheduleConfig(iterations=5, epochs=5)
    with pytest.raises(ValueError, match="set one of them"):
        ScheduleConfig()
    with pytest.raises(ValueError, match="must rise and lie within 1 to 9"):
        ScheduleConfig(iterations=10, steps=(8, 12))
    with pytest.raises(ValueError, match="no meaning with decay"):
        ScheduleConfig(iterations=10, steps=(8,), decay="cosine")
    with pytest.raises(ValueError, match=r"set validation.every"):
        ValidationConfig(patience=2)
    with pytest.raises(ValueError, match=r"above predict.max_detections"):
        Recipe(validation=ValidationConfig(max_detections=500))


def test_every_field_has_a_doc():
    """Units stand below the fields; sections say at their class what they are."""
    source = Path(config.__file__).read_text().splitlines()
    fields = [n for n, line in enumerate(source) if re.match(r"    \w+: .+ = ", line)]
    assert len(fields) > 40
    for n in fields:
        is_section = re.match(r"    \w+: \w+Config = ", source[n])
        assert is_section or source[n + 1].strip().startswith('"""'), source[n]


def test_keys_name_every_field_once():
    names = keys()
    assert len(names) == len(set(names))
    assert {
        "model",
        "optimizer.lr",
        "augment.copy_paste",
        "overrides.anchor_sizes",
        "run.max_seconds",
    } <= set(names)
