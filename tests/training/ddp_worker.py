"""What each process of test_distributed.py runs: python ddp_worker.py FOLDER STEPS RESUME, alone or under
torchrun."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import torch

from dsg.model.training import distributed
from dsg.model.training.checkpoint import TrainState, load_state, save_state
from dsg.model.training.config import BatchConfig, EmaConfig, OptimizerConfig, Recipe, RunConfig, ScheduleConfig
from dsg.model.training.ema import Ema
from dsg.model.training.log import TrainingLog
from dsg.model.training.loop import Hooks, TrainLoop
from dsg.model.training.optim import Schedule, build_optimizer

# By path: where pytest loads this file, its folder is not on the path.
_SPEC = importlib.util.spec_from_file_location("training_conftest", Path(__file__).with_name("conftest.py"))
_shared = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_shared)


def main(out: Path, accumulate: int = 1, first_part: bool = False, resume: bool = False) -> None:
    recipe = Recipe(
        optimizer=OptimizerConfig(lr=0.05, clip_norm=1.0),
        schedule=ScheduleConfig(iterations=4, warmup_iterations=2),
        batch=BatchConfig(images=8, accumulate=accumulate, workers=0),
        ema=EmaConfig(decay=0.9),
        run=RunConfig(log_every=1, max_seconds=1e-9 if first_part else 0),
    )
    with distributed.processes("cpu") as (ranks, device):
        torch.manual_seed(3)
        model = _shared.TinyDetector(noise=0.0)
        model.backbone[1].eval().train = lambda mode=True: None  # statistics of a part of the batch would differ
        state = TrainState(
            model=model,
            optimizer=build_optimizer(model, recipe.optimizer, 8),
            scaler=torch.amp.GradScaler(enabled=False),
            ema=Ema(model, recipe.ema.decay),
        )
        if resume:
            load_state(out / "last", state, recipe, "digest")

        def batches():
            for pictures, targets in _shared.make_batches(state.iteration, 8):
                mine = slice(ranks.rank, None, ranks.world_size)
                yield pictures[mine], targets[mine]

        def validate(network):
            part = distributed.gather_lists([ranks.rank])
            return distributed.from_main({"AP": float(len(part))} if ranks.is_main else None)

        def save_last():
            if ranks.is_main:
                save_state(out / "last", state, recipe, "digest")

        hooks = Hooks(validate, lambda network, metrics: None, save_last)
        schedule = Schedule.of(recipe.schedule, epoch_iterations=9)
        with TrainingLog(out, state.iteration, 4, ranks.is_main) as log:
            TrainLoop(state, batches(), schedule, recipe, hooks, log, device=device, ranks=ranks).run()
        # each process its own copy, to see that all hold the same weights
        torch.save(dataclasses.asdict(ranks) | {"weights": model.state_dict()}, out / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), "--first-part" in sys.argv, "--resume" in sys.argv)
