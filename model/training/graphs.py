"""CUDA graphs of the part of a step whose shapes never change: backbone, pyramid and the RPN's head, both ways.

A Lite network launches some thousand small kernels a step there, and Python takes longer to launch them than the GPU to
run them. Captured once, they are replayed in one call each.
"""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dsg.model.network.batch import padded_size
from dsg.model.network.detector import Detector


def capture(model: torch.nn.Module, images: int, side: int, precision: torch.dtype) -> bool:
    """Makes the network's backbone and RPN head replay graphs in training mode; in eval mode they run as before.

    Args:
        model: in training mode, on a GPU; not wrapped for several processes.
        images: pictures of every batch.
        side: height and width of every picture, pixels.
        precision: of autocast; float32: none.

    Returns:
        Whether anything was captured. A network of other parts is left alone, and so is one with batch norms that
        train, whose statistics the trial runs before a capture would spoil.
    """
    if not isinstance(model, Detector) or any(isinstance(part, _BatchNorm) for part in model.modules()):
        return False
    height, width = padded_size(side, side)
    # The capture runs on a stream of its own, and autograd remembers that; nothing of it is run again but the graphs.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    device = next(model.parameters()).device
    # Casts of weights are part of the graph: a cache would tie it to tensors that are gone by the next step.
    with torch.autocast("cuda", precision, enabled=precision != torch.float32, cache_enabled=False):
        batch = torch.zeros(images, 3, height, width, device=device)
        levels = [level.detach().requires_grad_() for level in model.backbone(batch)]
        torch.cuda.make_graphed_callables(
            (model.backbone, model.rpn_head),
            ((batch,), (levels,)),  # type: ignore[arg-type]  # lists of tensors are taken, too
            allow_unused_input=True,
        )
    return True
