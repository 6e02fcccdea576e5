"""Two processes with gloo against one with the whole batch: same gradients, same weights, same files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def alone():
    """The worker's `main`, to be called in this process."""
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def two_processes(out, *arguments):
    """Runs the worker under torchrun to its end."""
    out.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(WORKER), str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path, alone):
    """With accumulation, and also when the run goes on with another number of processes."""
    alone(tmp_path / "one")
    two_processes(tmp_path / "two", "2", "--first-part")  # stops after one step ...
    two = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [(one["rank"], one["world_size"]) for one in two] == [(0, 2), (1, 2)]
    for name, tensor in two[0]["weights"].items():
        assert torch.equal(tensor, two[1]["weights"][name]), name
    alone(tmp_path / "two", resume=True)  # ... and goes on alone

    one = torch.load(tmp_path / "one" / "last", weights_only=True)
    parts = torch.load(tmp_path / "two" / "last", weights_only=True)
    assert one["iteration"] == parts["iteration"] == 4
    same(parts["model"], one["model"])
    same(parts["ema"]["module"], one["ema"]["module"])

    def losses(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)  # the mean over processes; one writes


@pytest.mark.slow
def test_two_processes_to_the_end(tmp_path, alone):
    alone(tmp_path / "one")
    two_processes(tmp_path / "two", "1")
    one, two = (torch.load(tmp_path / folder / "last", weights_only=True) for folder in ("one", "two"))
    same(two["model"], one["model"])
    assert (one["best_ap"], two["best_ap"]) == (1.0, 2.0)  # all processes took part in validation
