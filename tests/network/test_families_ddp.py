"""Every family under DistributedDataParallel, in two processes of which one has nothing to learn from."""

import os
import subprocess
import sys
from pathlib import Path

from family_cases import FAMILIES

WORKER = Path(__file__).with_name("family_ddp_worker.py")


def test_two_processes_get_the_same_gradients_of_every_parameter(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(WORKER), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1)] == [" ".join(FAMILIES).split()] * 2
