"""A training on two hosts that find each other by torchrun's rendezvous: here two torchrun of one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SMALL = (
    "augment.short_sides=[96]",
    "augment.short_side_range=false",
    "predict.short_side=96",
    "batch.images=4",
    "batch.workers=0",
    "schedule.iterations=3",
    "schedule.warmup_iterations=0",
    "validation.every=3",
    "run.log_every=1",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(launcher: list[str], data: Path, out: Path) -> subprocess.Popen[str]:
    """One host's torchrun of `dsg train`."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "dsg.cli", "train"]
    changes = [word for setting in SMALL for word in ("--set", setting)]
    command += ["--config", "fast", "--data", str(data), "--val", str(data), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *changes], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_two_hosts_train_what_two_processes_of_one_do(tmp_path: Path, shapes) -> None:
    data = shapes(tmp_path / "data", pictures=8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # As docs/training.md has it, with a host's own folder for each.
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    outs = [tmp_path / "first" / "run", tmp_path / "second" / "run"]
    hosts = [start([*meet, "--rdzv-id=run"], data, out) for out in outs]
    said = [host.communicate(timeout=500)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)[-4000:]
    # The process of rank 0 writes, on whichever host that is.
    (out,) = [out for out in outs if (out / "best.safetensors").exists()]
    assert (out / "last").exists()

    alone = start(["--standalone", "--nproc-per-node=2"], data, tmp_path / "one")
    said_alone = alone.communicate(timeout=500)[0]
    assert alone.returncode == 0, said_alone[-4000:]
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(out)) == 3
    states = [torch.load(folder / "last", weights_only=True)["model"] for folder in (out, tmp_path / "one")]
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
