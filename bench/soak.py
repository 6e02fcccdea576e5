"""Whether a server's memory stays flat: minutes of load on a real one. Not part of the tests.

    python -m dsg.bench.soak --minutes 10 --out bench/results/service_soak_cpu.json

A part of the clients hangs up early, sends nonsense, or gives its requests too little time, as real ones do.
"""

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from dsg.bench import report
from dsg.bench.load import Load
from dsg.bench.report import Row
from dsg.bench.service import MIXED, make_pictures
from dsg.bench.service_processes import Setup, serving

_SAMPLE_S = 5.0
_CLIENTS = 8
_HASTY_S = 0.05  # deadline of the clients in a hurry
_WARM_SHARE = 0.3  # of the time, until caches and pools have the size that they keep


async def soak(port: int, process_id: int, seconds: float, pictures: Sequence[bytes]) -> tuple[list[int], Counter[int]]:
    """Load a server for so long.

    Returns:
        bytes of memory of its processes every five seconds, and its answers by status.
    """
    memory: list[int] = []
    statuses: Counter[int] = Counter()
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def sample() -> None:
        while loop.time() < end:
            memory.append(resident_bytes(process_id))
            await asyncio.sleep(_SAMPLE_S)

    async def drive(load: Load, clients: int) -> None:
        async with load:
            while (left := end - loop.time()) > 0:
                done = await load.closed(clients, min(left, _SAMPLE_S))
                statuses.update(answer.status for answer in done.answers)

    broken = [picture[: len(picture) // 2] for picture in pictures]
    await asyncio.gather(
        sample(),
        drive(Load(port, "/segment", pictures, deadline_s=60), _CLIENTS),
        drive(Load(port, "/segment", pictures, deadline_s=_HASTY_S), 1),
        drive(Load(port, "/segment", broken, deadline_s=60), 1),
    )
    return memory, statuses


def resident_bytes(process_id: int) -> int:
    """Memory of a process and of those that it started, shared pages counted once for each."""
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    children = {
        int(child)
        for task in Path(f"/proc/{process_id}/task").iterdir()
        for child in (task / "children").read_text().split()
    }
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(child) for child in children)


def main() -> None:
    """Soak, say what was seen, write a file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default="dsg_lite0_coco")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    report.commit()
    pictures = make_pictures(MIXED, None)
    with serving("dsg", Setup(arguments.model, arguments.device, max_batch=8), deadline_s=60) as running:
        memory, statuses = asyncio.run(soak(running.port, running.process_id, arguments.minutes * 60, pictures))
    warm = memory[int(_WARM_SHARE * len(memory)) :]
    middle = len(warm) // 2
    first, last = sum(warm[:middle]) / max(1, middle), sum(warm[middle:]) / max(1, len(warm) - middle)
    case = f"memory in the last part of {arguments.minutes:g} min of load; baseline the part before"
    rows = [Row(case, round(last / 1e6, 1), "MB", round(first / 1e6, 1), round(first / last, 4))]
    total = sum(statuses.values())
    for status, count in sorted(statuses.items()):
        case = f"answers with status {status}; baseline all"
        rows.append(Row(case, count, "answers", total, round(count / total, 4)))
    report.write(arguments.out, rows, torch.device(arguments.device))
    for row in rows:
        sys.stdout.write(f"{row.value:12.1f} {row.unit}  baseline {row.baseline:.1f}  {row.case}\n")


if __name__ == "__main__":
    main()
