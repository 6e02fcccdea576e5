"""The trainable model: network, data, training and the weights that ship."""

from dsg.model.network.build import build
from dsg.model.network.detections import Detections
from dsg.model.network.predictor import Predictor, load
from dsg.model.network.presets import presets

__all__ = ["Detections", "Predictor", "build", "load", "presets"]
