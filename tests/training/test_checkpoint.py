"""`last`: whole or not at all, and refused where it does not belong."""

import dataclasses
import os

import pytest
import torch

from dsg.model.training import checkpoint
from dsg.model.training.checkpoint import TrainState, load_state, save_state, seed_step
from dsg.model.training.config import (
    BatchConfig,
    OptimizerConfig,
    PredictConfig,
    RunConfig,
    ScheduleConfig,
    ValidationConfig,
)
from dsg.model.training.errors import TrainingError
from dsg.model.training.optim import build_optimizer


@pytest.fixture
def state(tiny_detector, tiny_recipe):
    model = tiny_detector()
    optimizer = build_optimizer(model, tiny_recipe().optimizer, 4)
    return TrainState(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler(enabled=False), iteration=3)


def test_round_trip(state, tiny_recipe, tiny_detector, tmp_path):
    state.best_ap, state.stale_validations, state.validated_at, state.seconds = 0.25, 2, 3, 1.5
    save_state(tmp_path / "new" / "last", state, tiny_recipe(), "digest")
    model = tiny_detector()
    other = TrainState(
        model=model,
        optimizer=build_optimizer(model, tiny_recipe().optimizer, 4),
        scaler=torch.amp.GradScaler(enabled=False),
    )
    load_state(tmp_path / "new" / "last", other, tiny_recipe(), "digest")
    counts = ("iteration", "best_ap", "stale_validations", "validated_at", "seconds")
    assert [getattr(other, name) for name in counts] == [3, 0.25, 2, 3, 1.5]
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), model.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last"]


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_dies_leaves_the_old_file(broken, state, tiny_recipe, tmp_path, monkeypatch):
    save_state(tmp_path / "last", state, tiny_recipe(), "digest")
    before = (tmp_path / "last").read_bytes()
    state.iteration = 4

    def half(content, file):
        file.write_bytes(b"half of a file")
        raise OSError("no space left on device")

    def dies(*arguments):
        raise KeyboardInterrupt

    if broken == "torch.save":
        monkeypatch.setattr(checkpoint.torch, "save", half)
    else:
        monkeypatch.setattr(os, broken.split(".")[1], dies)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_state(tmp_path / "last", state, tiny_recipe(), "digest")
    monkeypatch.undo()
    assert (tmp_path / "last").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": OptimizerConfig(lr=0.5, clip_norm=1.0)},
            r"optimizer.lr was 0.05 in .*last and is 0.5 now",
        ),
        ({"batch": BatchConfig(images=8)}, r"batch.images was 4 in .* and is 8 now"),
        ({"model": "mask_rcnn_r50_fpn"}, r"model was dsg_r50_fpn in"),
        ({"overrides": {"proposals": 5}}, r"overrides.proposals was nothing in .* and is 5 now"),
        ({"run": RunConfig(seed=1)}, r"run.seed was 0 in"),
    ],
)
def test_another_recipe_is_refused(changes, message, state, tiny_recipe, tmp_path):
    save_state(tmp_path / "last", state, tiny_recipe(), "digest")
    with pytest.raises(TrainingError, match=message) as caught:
        load_state(tmp_path / "last", state, tiny_recipe(**changes), "digest")
    assert "\n" not in str(caught.value)


def test_what_does_not_decide_what_is_learned_may_change(state, tiny_recipe, tmp_path):
    save_state(tmp_path / "last", state, tiny_recipe(), "digest")
    recipe = tiny_recipe(
        name="renamed",
        batch=BatchConfig(images=4, accumulate=2, workers=3),
        run=RunConfig(max_seconds=5, log_every=1, precision="fp32"),
        validation=ValidationConfig(every=5),
        schedule=ScheduleConfig(iterations=123),  # a run may go on longer than was planned
        predict=PredictConfig(precision=0.8, score_threshold=0.3),
    )
    load_state(tmp_path / "last", state, recipe, "digest")


def test_other_files_are_refused(state, tiny_recipe, tmp_path, tiny_detector):
    recipe = tiny_recipe()
    with pytest.raises(TrainingError, match=r"--resume: .*gone does not exist"):
        load_state(tmp_path / "gone", state, recipe, "digest")
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(TrainingError, match=r"text cannot be read"):
        load_state(tmp_path / "text", state, recipe, "digest")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(TrainingError, match=r"no resume file of this version"):
        load_state(tmp_path / "other", state, recipe, "digest")
    save_state(tmp_path / "last", state, recipe, "digest")
    with pytest.raises(TrainingError, match=r"the training data are not those of"):
        load_state(tmp_path / "last", state, recipe, "other digest")
    wider = dataclasses.replace(state, model=torch.nn.Linear(2, 2))
    with pytest.raises(TrainingError, match=r"holds another network"):
        load_state(tmp_path / "last", wider, recipe, "digest")


def test_nothing_in_the_file_is_code(state, tiny_recipe, tmp_path):
    """The loader that runs no code takes it."""
    save_state(tmp_path / "last", state, tiny_recipe(), "digest")
    assert torch.load(tmp_path / "last", weights_only=True)["iteration"] == 3


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone():
    def draw(*where):
        seed_step(*where)
        return torch.rand(3).tolist()

    assert draw(0, 5, 0) == draw(0, 5, 0)
    draws = [draw(0, 5, 0), draw(1, 5, 0), draw(0, 6, 0), draw(0, 5, 1)]
    assert len({tuple(one) for one in draws}) == 4
