"""From the weights of a plain network to those of one with guidance, which starts from the same predictions."""

from collections.abc import Mapping

import torch
from torch import Tensor

_SCALE = "guidance_scale"
_PROPOSALS = "mpn."
_HEAD = "mask_head."


def lacks_guidance(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    """Whether the first is of a network with guidance and the second of one without."""
    return _SCALE in wanted and not any(name.startswith(_PROPOSALS) for name in found)


def guided_start(wanted: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that `plain` lacks, such that it keeps its predictions: guidance is multiplied by 0 (training raises that
    to 1 over its warm-up), and what fusions add is 0. Mask heads that are new begin as a copy of one that is there, the
    mask proposal network with the mean over its classes.

    Args:
        wanted: state dict of the network with guidance, its values fresh.
        plain: state dict of the plain network, under the names of the other.

    Returns:
        the missing tensors; what `plain` has nothing like stays fresh.
    """
    heads = sorted(
        name.rpartition("predictor.weight")[0] for name in plain if name.endswith("mask_head.predictor.weight")
    )
    made: dict[str, Tensor] = {}
    for name, fresh in wanted.items():
        if name in plain and plain[name].shape == fresh.shape:
            continue
        if name == _SCALE:
            made[name] = torch.zeros_like(fresh)
        elif ".conv." in name and ("fuse_box." in name or "fuse_mask." in name):
            made[name] = _fusion(fresh, plain.get(name))
        elif name.startswith(_PROPOSALS) and heads:
            made[name] = _copied(fresh, plain.get(heads[0] + name.removeprefix(_PROPOSALS)))
        elif _HEAD in name and heads:
            made[name] = _copied(fresh, plain.get(heads[-1] + name.partition(_HEAD)[2]))
    return made


def _fusion(fresh: Tensor, before: Tensor | None) -> Tensor:
    """Nothing, or a 1x1 convolution (HTC has one between its mask heads) in the middle of a larger one."""
    started = torch.zeros_like(fresh)
    if before is not None and before.dim() == 4 and before.shape[:2] == fresh.shape[:2] and before.shape[-1] == 1:
        middle = fresh.shape[-1] // 2
        started[..., middle, middle] = before[..., 0, 0]
    return started


def _copied(fresh: Tensor, other: Tensor | None) -> Tensor:
    if other is None:
        return fresh
    if other.shape[1:] == fresh.shape[1:] and fresh.shape[0] == 1 < other.shape[0]:
        return other[1:].mean(dim=0, keepdim=True)  # the classes without background
    return other.clone() if other.shape == fresh.shape else fresh
