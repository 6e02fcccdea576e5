"""Where the weights of a new run come from: a checkpoint, a backbone's file, or nowhere."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from dsg.model.network.backbones import load_backbone_weights
from dsg.model.network.guided_start import guided_start, lacks_guidance
from dsg.model.network.predictor import shipped_weights, weights_path
from dsg.model.training.errors import TrainingError

_NAMES_SHOWN = 3


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The part of a network that ImageNet weights fit, without its pyramid; None where it has no
    `backbone`."""
    backbone = getattr(model, "backbone", None)
    return getattr(backbone, "body", backbone)


def initialise(model: nn.Module, source: str) -> str:
    """Fills a network from weights that were trained before.

    From a checkpoint of this project every tensor of the same name and shape is taken; others, such as the
    last layers of a network for another number of classes, stay as they are. A network with guidance takes a plain
    one's weights and starts from its predictions. Any other file must be the backbone's.

    Args:
        model: the network, changed in place.
        source: a name that `dsg models` lists, or a path.

    Returns:
        One line on what was taken and what stays fresh.

    Raises:
        TrainingError: no such file, nothing in it fits, or the network has no backbone to fill.
        ValueError: the file is broken, or the backbone's tensors do not fit.
    """
    path = weights_path(source)
    if not path.is_file():
        known = ", ".join(shipped_weights()) or "none here"
        raise TrainingError(f"--init {source}: neither a file nor a name of shipped weights ({known})")
    if _is_checkpoint(path):
        return _from_checkpoint(model, path)
    backbone = backbone_of(model)
    if backbone is None:
        raise TrainingError(f"--init {source}: the network has no part `backbone` that these weights could fill")
    load_backbone_weights(backbone, path)
    return f"init: backbone from {path.name}; neck and heads start fresh"


def _is_checkpoint(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "dsg" in (file.metadata() or {})
    except SafetensorError:
        return False


@torch.no_grad()
def _from_checkpoint(model: nn.Module, path: Path) -> str:
    found = load_file(path)
    own = model.state_dict()
    guided = lacks_guidance(own, found)
    if guided:
        found |= guided_start(own, found)
    fits = {name for name, tensor in own.items() if name in found and found[name].shape == tensor.shape}
    if not fits:
        raise TrainingError(f"--init {path}: none of its tensors fits this network; is it another preset?")
    for name in fits:
        own[name].copy_(found[name])
    fresh = [name for name in own if name not in fits]
    line = f"init: {len(fits)} of {len(own)} tensors from {path.name}"
    if guided:
        line += ", which has no guidance: it comes in over the warm-up"
    if fresh:
        more = f" and {len(fresh) - _NAMES_SHOWN} more" if len(fresh) > _NAMES_SHOWN else ""
        line += f"; fresh, since absent there or of another shape: {', '.join(fresh[:_NAMES_SHOWN])}{more}"
    return line
