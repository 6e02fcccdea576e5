"""Whether a graph is being recorded that must hold for pictures and batches of every size."""

import torch


def is_traced() -> bool:
    """True while `torch.export` or `torch.jit.trace` looks on: what depends on a size is then no Python number."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
