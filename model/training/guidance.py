"""Guidance of a network that began as a plain one: nothing at first, all of it after the warm-up."""

import torch
from torch import nn

_NAME = "guidance_scale"


@torch.no_grad()
def raise_guidance(models: list[nn.Module], iteration: int, warmup_iterations: int) -> None:
    """Sets the share of the guidance for one step, in proportion to the warm-up; it never falls.

    Networks that are built have all of it, and keep it. One that was made from plain weights has none
    (`dsg.model.network.guided_start`), and gets it as the learning rate rises. A function of the step's number, so a
    resumed run goes on where it was.

    Args:
        models: the network, and its moving average where there is one; those without guidance are left alone.
        iteration: steps done, from 0.
        warmup_iterations: length of the warm-up; 0: all at once.
    """
    share = min(1.0, (iteration + 1) / max(warmup_iterations, 1))
    for model in models:
        scale = dict(model.named_buffers(recurse=False)).get(_NAME)
        if scale is not None:
            scale.clamp_(min=share)
