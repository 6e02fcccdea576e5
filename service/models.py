"""The models that one process serves, by name; loading and swapping them."""

import re
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsg.service.metrics import Metrics
from dsg.service.problems import Problem

if TYPE_CHECKING:
    from dsg.model.network.predictor import Predictor

LoadPredictor = Callable[[str, str | None], "Predictor"]
"""(name or path, device or None for the best) -> Predictor; raises ValueError or OSError with one line."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIXES = (".safetensors", ".onnx", ".ts", ".pt2")
# A common photo's size: its bucket is the first that traffic will want.
_WARM_UP_SIZE = (480, 640)


def load_predictor(name_or_path: str, device: str | None) -> "Predictor":
    """Load a checkpoint: a shipped name, or a path. The default of `create_app`."""
    from dsg import export  # here, and not above: importing the service imports no torch

    return export.load(name_or_path, device)


def kernel_in_use() -> str:
    """Which implementation of the shape-guided op runs in torch, for the log."""
    if find_spec("torch") is None:
        return "no torch here, exported files bring their own"
    from dsg import ops

    return ops.kernel_name()


def warm_up_picture() -> np.ndarray:
    """A grey picture, uint8 [H, W, 3]: a network's first run is slow, and no client should wait for it."""
    return np.full((*_WARM_UP_SIZE, 3), 114, dtype=np.uint8)


class Models:
    """Names -> predictors. `serve` swaps in one step; a request keeps the predictor that it began with.

    Args:
        load: how a predictor is made.
        device: given to `load`.
        model_dir: folder whose files go before shipped names, and the only one that `reload_source` looks in.
        metrics: told which models are served.
    """

    def __init__(self, load: LoadPredictor, device: str | None, model_dir: Path | None, metrics: Metrics) -> None:
        self._load = load
        self._device = device
        self._model_dir = model_dir
        self._metrics = metrics
        self._served: dict[str, Predictor] = {}
        self._loading = threading.Lock()

    def names(self) -> list[str]:
        """Names being served; the first is the default."""
        return list(self._served)

    def get(self, name: str | None) -> "Predictor":
        """The predictor of a name, or the default one. Raises the 422 problem for an unknown name."""
        if name is None:
            return next(iter(self._served.values()))
        try:
            return self._served[name]
        except KeyError:
            detail = f"no model is named {name[:100]!r}; there are {', '.join(self._served)}"
            raise Problem(422, "unknown_model", detail) from None

    @staticmethod
    def check_names(asked: Sequence[str]) -> None:
        """Raise ValueError if two models that the operator names would be served under one name.

        Every training run calls its files best and last, so that models of two runs are easily given so.
        """
        sources: dict[str, str] = {}
        for source in asked:
            name = _served_name(source)
            if name in sources:
                raise ValueError(
                    f"{sources[name]} and {source} would both be served as {name!r}; rename one file, or put it "
                    "into DSG_MODEL_DIR under its own name"
                )
            sources[name] = source

    def load(self, asked: str) -> "tuple[str, Predictor]":
        """Load a model that the operator names: a file of `model_dir`, a shipped name, or a path.

        Returns:
            the name to serve it under (a path's file name without its ending), and the predictor.
        """
        source = asked
        if _NAME.fullmatch(asked) and (found := self._in_model_dir(asked)) is not None:
            source = str(found)
        name = _served_name(asked)
        # One at a time: two models being read at once would need their memory at once.
        with self._loading:
            return name, self._load(source, self._device)

    def reload_source(self, name: str) -> str:
        """Check a name that came over the network.

        Raises:
            Problem: 422 for anything but the name of a file in `model_dir`.
        """
        if self._model_dir is None:
            raise Problem(422, "no_model_dir", "this server has no model folder; set DSG_MODEL_DIR and restart it")
        if not _NAME.fullmatch(name) or self._in_model_dir(name) is None:
            detail = f"{name[:100]!r} is not the name of a model in the model folder"
            raise Problem(422, "unknown_model", detail)
        return name

    def serve(self, name: str, predictor: "Predictor") -> None:
        """Answer with `predictor` under `name` from now on."""
        self._served[name] = predictor
        self._metrics.model.clear()
        for served, one in self._served.items():
            self._metrics.model.labels(served, one.info.version, one.info.hash, one.info.licence).set(1)

    def _in_model_dir(self, name: str) -> Path | None:
        if self._model_dir is None:
            return None
        endings = ("",) if name.endswith(_SUFFIXES) else _SUFFIXES
        files = [self._model_dir / f"{name}{ending}" for ending in endings]
        return next((path for path in files if path.is_file()), None)


def _served_name(asked: str) -> str:
    path = Path(asked)
    return path.stem if path.suffix in _SUFFIXES else path.name
