"""The loop around a tiny network: exact resume, stops, what it writes, what it says when something breaks."""

import json
import math
import os
import signal

import pytest
import torch
from rich.console import Console

from dsg.model.data.packed import PackedBatch
from dsg.model.training.checkpoint import TrainState, load_state, save_state
from dsg.model.training.config import BatchConfig, OptimizerConfig, RunConfig, ValidationConfig
from dsg.model.training.distributed import Ranks
from dsg.model.training.ema import Ema
from dsg.model.training.errors import TrainingError
from dsg.model.training.log import TrainingLog
from dsg.model.training.loop import Hooks, TrainLoop, precision_of
from dsg.model.training.optim import Schedule, build_optimizer
from dsg.model.training.stop import StopRequest


def fresh_state(model_class, recipe):
    torch.manual_seed(5)
    model = model_class()
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer, recipe.batch.images),
        scaler=torch.amp.GradScaler(enabled=False),
        ema=Ema(model, recipe.ema.decay) if recipe.ema.decay else None,
    )


class Run:
    """One part of a run in `folder`; validation gives the APs that it is told."""

    def __init__(self, folder, recipe, model_class, batches, *, resume=False, aps=(), on_batch=None):
        self.folder, self.recipe, self.aps = folder, recipe, iter(aps)
        self.best, self.saved = [], 0
        self.state = fresh_state(model_class, recipe)
        if resume:
            load_state(folder / "last", self.state, recipe, "digest")
        self.stream = batches(self.state.iteration, recipe.batch.images)
        self.on_batch = on_batch

    def go(self):
        schedule = Schedule.of(self.recipe.schedule, epoch_iterations=25)
        hooks = Hooks(validate=self.validate, save_best=self.save_best, save_last=self.save_last)
        console = Console(quiet=True)
        with TrainingLog(self.folder, self.state.iteration, schedule.iterations, console=console) as log:
            loop = TrainLoop(
                self.state,
                self.watched(),
                schedule,
                self.recipe,
                hooks,
                log,
                device=torch.device("cpu"),
                ranks=Ranks(),
            )
            return loop.run()

    def watched(self):
        for batch in self.stream:
            if self.on_batch:
                self.on_batch(self, batch)
            yield batch

    def validate(self, model):
        assert not model.training
        ap = next(self.aps, 0.0)
        return {"AP": ap, "segm/AP": ap}

    def save_best(self, model, metrics):
        self.best.append((self.state.iteration, metrics["AP"]))

    def save_last(self):
        self.saved += 1
        save_state(self.folder / "last", self.state, self.recipe, "digest")

    def metrics(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def everything(state):
    """All tensors that a run carries on."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.module.state_dict().items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in entry.items()}
    return tensors


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_goes_on_bit_for_bit(kind, accumulate, tmp_path, tiny_detector, batches, tiny_recipe):
    recipe = tiny_recipe(
        optimizer=OptimizerConfig(kind=kind, lr=0.01, clip_norm=1.0),
        batch=BatchConfig(images=4, accumulate=accumulate, workers=0),
    )
    straight = Run(tmp_path / "straight", recipe, tiny_detector, batches)
    assert straight.go() == "finished"

    def stop_at_three(run, batch):
        if run.state.iteration == 2:
            signal.raise_signal(signal.SIGTERM)  # in the middle of the third step

    first = Run(tmp_path / "parts", recipe, tiny_detector, batches, on_batch=stop_at_three)
    assert (first.go() == "stopped by SIGTERM") and first.state.iteration == 3
    torch.manual_seed(99)  # whatever happened in between
    second = Run(tmp_path / "parts", recipe, tiny_detector, batches, resume=True)
    assert second.state.iteration == 3
    assert second.go() == "finished"

    expected, found = everything(straight.state), everything(second.state)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert second.state.ema.updates == straight.state.ema.updates == 6


def test_accumulated_parts_equal_one_large_step(tmp_path, tiny_detector, batches, tiny_recipe):
    """With losses that are means over images and no noise, two halves give the gradient of the whole."""

    class Quiet(tiny_detector):
        def __init__(self):
            super().__init__(noise=0.0)
            self.backbone[1].eval().train = lambda mode=True: None  # statistics of half a batch would differ

    whole = Run(tmp_path / "1", tiny_recipe(), Quiet, batches)
    parts = Run(tmp_path / "2", tiny_recipe(batch=BatchConfig(images=4, accumulate=2)), Quiet, batches)
    whole.go(), parts.go()
    for name, tensor in everything(whole.state).items():
        torch.testing.assert_close(everything(parts.state)[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_non_finite_loss_stops_and_keeps_last(tmp_path, tiny_detector, batches, tiny_recipe):
    def poison(run, batch):
        if run.state.iteration == 4:
            batch[1][0]["boxes"].fill_(math.nan)

    recipe = tiny_recipe(run=RunConfig(save_every=3))
    run = Run(tmp_path, recipe, tiny_detector, batches, on_batch=poison)
    with pytest.raises(TrainingError, match=r"^iteration 4: loss_a is nan; .*`last`.* lower optimizer.lr") as caught:
        run.go()
    assert "\n" not in str(caught.value)
    kept = fresh_state(tiny_detector, recipe)
    load_state(tmp_path / "last", kept, recipe, "digest")
    assert kept.iteration == 3
    assert all(tensor.isfinite().all() for tensor in kept.model.state_dict().values())
    assert all(tensor.isfinite().all() for tensor in run.state.model.state_dict().values())  # no step was made


def test_non_finite_gradient_stops(tmp_path, tiny_detector, batches, tiny_recipe):
    class Steep(tiny_detector):
        def forward(self, images, targets=None):
            losses = super().forward(images, targets)
            losses["loss_b"] = losses["loss_b"] + (self.head.weight[0, 0] * 0).sqrt()  # 0, of infinite slope
            return losses

    with pytest.raises(TrainingError, match=r"^iteration 0: the gradients' norm is nan"):
        Run(tmp_path, tiny_recipe(), Steep, batches).go()


def test_out_of_memory_says_what_to_lower(tmp_path, tiny_detector, batches, tiny_recipe, monkeypatch):
    def forward(self, images, targets=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany more lines")

    monkeypatch.setattr(tiny_detector, "forward", forward)
    recipe = tiny_recipe(batch=BatchConfig(images=4, accumulate=2))
    message = r"^iteration 0: out of GPU memory with 2 images at once: raise batch.accumulate \(now 2\), or lower"
    with pytest.raises(TrainingError, match=message) as caught:
        Run(tmp_path, recipe, tiny_detector, batches).go()
    assert "batch.images (now 4)" in str(caught.value) and "\n" not in str(caught.value)


def test_validation_best_and_early_stop(tmp_path, tiny_detector, batches, tiny_recipe):
    recipe = tiny_recipe(validation=ValidationConfig(every=1, patience=2))
    run = Run(tmp_path, recipe, tiny_detector, batches, aps=[0.1, 0.3, 0.2, 0.3])
    assert run.go() == "no better AP in 2 validations"
    assert run.best == [(1, 0.1), (2, 0.3)]
    assert run.state.iteration == 4
    assert [m["AP"] for m in run.metrics() if m["kind"] == "validation"] == [0.1, 0.3, 0.2, 0.3]
    assert run.state.model.training


def test_last_validation_comes_without_being_asked_for(tmp_path, tiny_detector, batches, tiny_recipe):
    run = Run(tmp_path, tiny_recipe(), tiny_detector, batches, aps=[0.0])
    assert run.go() == "finished"
    assert run.best == [(6, 0.0)]  # an AP of zero is still the best so far: a file is written
    again = Run(tmp_path, tiny_recipe(), tiny_detector, batches, resume=True)
    assert again.go() == "finished"
    assert again.best == []  # nothing left to do, nothing done twice


def test_a_run_stopped_before_its_validation_makes_up_for_it(tmp_path, tiny_detector, batches, tiny_recipe):
    def stop(run, batch):
        if run.state.iteration == 2:
            signal.raise_signal(signal.SIGINT)

    recipe = tiny_recipe(validation=ValidationConfig(every=3))
    first = Run(tmp_path, recipe, tiny_detector, batches, on_batch=stop, aps=[0.5])
    assert first.go() == "stopped by SIGINT"
    assert first.best == []
    second = Run(tmp_path, recipe, tiny_detector, batches, resume=True, aps=[0.5, 0.6])
    second.go()
    assert second.best == [(3, 0.5), (6, 0.6)]


def test_time_budget_stops_after_a_step_and_the_schedule_stays(tmp_path, tiny_detector, batches, tiny_recipe):
    short = tiny_recipe(run=RunConfig(log_every=2, max_seconds=1e-9))
    run = Run(tmp_path, short, tiny_detector, batches)
    assert run.go() == "stopped after its 1e-09 s"
    assert run.state.iteration == 1 and (tmp_path / "last").is_file()
    rest = Run(tmp_path, tiny_recipe(), tiny_detector, batches, resume=True)
    assert rest.go() == "finished"
    straight = Run(tmp_path / "straight", tiny_recipe(), tiny_detector, batches)
    straight.go()
    assert torch.equal(rest.state.model.head.weight, straight.state.model.head.weight)


def test_second_signal_interrupts_at_once_and_handlers_come_back(tmp_path, tiny_detector, batches, tiny_recipe):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def twice(run, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, tiny_recipe(), tiny_detector, batches, on_batch=twice).go()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_workers_leave_ctrl_c_to_the_main_process(monkeypatch):
    """Forked workers inherit the handlers: Ctrl-C must not kill them in the middle of a batch, SIGTERM
    must."""
    with StopRequest() as stop:
        with monkeypatch.context() as worker:
            worker.setattr(os, "getpid", lambda: -1)
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(SystemExit):
                signal.raise_signal(signal.SIGTERM)
        assert stop.reason == ""
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "stopped by SIGINT"


def test_out_of_memory_in_validation(tmp_path, tiny_detector, batches, tiny_recipe):
    def validate(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = Run(tmp_path, tiny_recipe(validation=ValidationConfig(every=2)), tiny_detector, batches)
    run.validate = validate
    with pytest.raises(TrainingError, match=r"^validation at 2: out of GPU memory: lower validation.batch \(now 4\)"):
        run.go()
    assert torch.load(tmp_path / "last", weights_only=True)["iteration"] == 2


def test_metrics_file(tmp_path, tiny_detector, batches, tiny_recipe):
    run = Run(tmp_path, tiny_recipe(validation=ValidationConfig(every=3)), tiny_detector, batches, aps=[0.25, 0.5])
    run.go()
    lines = run.metrics()
    assert [(line["kind"], line["iteration"]) for line in lines] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6),
    ]  # fmt: skip
    train = lines[0]
    assert set(train) == {
        "kind", "iteration", "loss", "loss_a", "loss_b", "grad_norm", "lr", "images_per_s", "data_wait",
    }  # fmt: skip
    assert train["loss"] == pytest.approx(train["loss_a"] + train["loss_b"])
    # warm-up of 2 steps from 1/3: the mean of 1/3 and 2/3; biases, at twice the rate, are left out
    assert train["lr"] == pytest.approx(0.05 * 0.5)
    assert train["grad_norm"] > 0 and 0 <= train["data_wait"] <= 1
    assert lines[1]["segm/AP"] == 0.25
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_resume_takes_out_the_lines_of_steps_that_are_done_again(tmp_path):
    console = Console(quiet=True)
    values = {"loss": 1.0, "lr": 0.1, "images_per_s": 1.0, "grad_norm": math.inf}
    with TrainingLog(tmp_path, 0, 9, console=console) as log:
        log.train(2, values)
        log.train(4, values)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iter')  # the process died here
    with TrainingLog(tmp_path, 2, 9, console=console) as log:
        log.train(4, {**values, "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(2, 1.0), (4, 2.0)]
    assert lines[0]["grad_norm"] is None  # infinity is no JSON


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bar_on_a_terminal_plain_lines_elsewhere(is_terminal, tmp_path):
    with (tmp_path / "out.txt").open("w+") as file:
        console = Console(file=file, force_terminal=is_terminal, width=120, color_system=None)
        with TrainingLog(tmp_path, 0, 4, console=console) as log:
            log.advance(2)
            log.train(2, {"loss": 1.5, "lr": 0.01, "images_per_s": 8.0})
        file.seek(0)
        text = file.read()
    if is_terminal:
        assert "2/4" in text and "\x1b[" in text
    else:
        assert text == "iteration 2/4  loss 1.500  lr 1.00e-02  8.0 images/s\n"


def test_other_processes_write_nothing(tmp_path):
    with TrainingLog(tmp_path / "out", 0, 4, is_main=False) as log:
        log.train(2, {})
        log.validation(2, {}, True)
        log.say("nothing")
    assert not (tmp_path / "out").exists()


def test_pictures_become_fractions(tmp_path, tiny_detector, batches, tiny_recipe):
    seen = []

    class Watching(tiny_detector):
        def forward(self, images, targets=None):
            seen.extend(images)
            return super().forward(images, targets)

    Run(tmp_path, tiny_recipe(), Watching, batches).go()
    first = next(batches(0, 4))[0][0]
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], first.double().div(255).float())


def test_precision():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert precision_of(cpu, "bf16") == torch.float32
    assert precision_of(cuda, "fp32") == torch.float32
    assert precision_of(cuda, "fp16") == torch.float16
    assert precision_of(cuda, "bf16") == torch.bfloat16


def all_parameters(model):
    """A copy of them in one row; `parameters_to_vector` cannot view those that are channels-last."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_on_a_gpu(precision, tmp_path, tiny_detector, batches, tiny_recipe):
    device = torch.device("cuda")
    recipe = tiny_recipe(run=RunConfig(precision=precision))
    model = tiny_detector().to(device, memory_format=torch.channels_last)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer, 4),
        scaler=torch.amp.GradScaler(enabled=precision == "fp16"),
    )
    schedule = Schedule.of(recipe.schedule, 25)
    hooks = Hooks(lambda model: {"AP": 0.0}, lambda model, metrics: None, lambda: None)
    before = all_parameters(model)
    with TrainingLog(tmp_path, 0, 6) as log:
        moved = (PackedBatch(batch).to(device).unpack() for batch in batches(0, 4))
        loop = TrainLoop(state, moved, schedule, recipe, hooks, log, device=device, ranks=Ranks())
        assert loop.run() == "finished"
    after = all_parameters(model)
    assert after.isfinite().all() and not torch.equal(before, after)
