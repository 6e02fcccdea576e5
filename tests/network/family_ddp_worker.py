"""What each process of test_families_ddp.py runs: python family_ddp_worker.py FOLDER, under torchrun."""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import FAMILIES, family, losses_of, without_gradient


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name in FAMILIES:
        model = family(name)
        wrapped = DistributedDataParallel(model)  # without find_unused_parameters: a missing gradient would hang it
        # one process has nothing to learn from, the other has
        for case in ("plain", "no ground truth") if rank == 0 else ("all proposals invalid", "plain"):
            losses = losses_of(model, case, through=wrapped)
            sum(losses.values()).backward()
            assert without_gradient(model) == [], name
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        both = [torch.empty_like(gradients) for _ in range(2)]
        torch.distributed.all_gather(both, gradients)
        assert torch.equal(*both) and gradients.isfinite().all(), name
    (folder / f"rank{rank}").write_text(" ".join(FAMILIES))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
