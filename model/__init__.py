"""The trainable model: network, data, training and the weights that ship."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsg.model.network.detections import Detections
from dsg.model.network.predictor import Predictor, load

if TYPE_CHECKING:
    from dsg.model.network.build import build
    from dsg.model.network.presets import presets

__all__ = ["Detections", "Predictor", "build", "load", "presets"]

# These need torch, and an exported file is served without it.
_HOMES = {"build": "dsg.model.network.build", "presets": "dsg.model.network.presets"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
