"""The models that one process serves, by name; loading and swapping them."""

import itertools
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg.service.devices import Device, LoadPredictor
from dsg.service.local_device import are_processes
from dsg.service.metrics import Metrics
from dsg.service.model_copy import ModelCopy
from dsg.service.problems import Problem
from dsg.service.settings import Settings

if TYPE_CHECKING:
    from dsg.model.network.checkpoint import CheckpointInfo
    from dsg.model.network.predictor import Precision, Predictor, PreparedImage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIXES = (".safetensors", ".onnx", ".ts", ".pt2")


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model on every device. When the last request lets go of it, the devices do too."""

    name: str
    number: int
    """What the devices know it by."""
    info: "CheckpointInfo"
    prepare: "Callable[[Any], PreparedImage]"
    """A picture, uint8 [H, W, 3] RGB, as the devices want it; from any thread."""


def load_predictor(
    name_or_path: str, device: str | None, precision: "Precision" = "auto", proposals: int | None = None
) -> "Predictor":
    """Load a checkpoint or an exported file: a shipped name, or a path. An exported file has its own precision."""
    from dsg import export  # here, and not above: importing the service imports no torch

    if name_or_path.endswith(_SUFFIXES[1:]):
        return export.load(name_or_path, device)
    return export.load(name_or_path, device, precision, proposals)


def loader(settings: Settings) -> LoadPredictor:
    """`load_predictor` as the settings want checkpoints; it can be sent to another process."""
    return partial(load_predictor, precision=settings.precision, proposals=settings.proposals)


def kernel_in_use() -> str:
    """Which implementation of the shape-guided op runs in torch, for the log."""
    if find_spec("torch") is None:
        return "no torch here, exported files bring their own"
    from dsg import ops

    return ops.kernel_name()


class Models:
    """Names -> models. `serve` swaps in one step; a request keeps the model that it began with.

    Args:
        load: makes the predictor that prepares pictures, where no device is of this process.
        devices: each gets every model.
        model_dir: folder whose files go before shipped names, and the only one that `reload_source` looks in.
        metrics: told which models are served.
    """

    def __init__(
        self, load: LoadPredictor, devices: Sequence[Device], model_dir: Path | None, metrics: Metrics
    ) -> None:
        self._load = load
        self._devices = devices
        self._model_dir = model_dir
        self._metrics = metrics
        self._served: dict[str, ServedModel] = {}
        self._numbers = itertools.count()
        self._copies: dict[int, ModelCopy] = {}
        self._loading = threading.Lock()

    def names(self) -> list[str]:
        """Names being served; the first is the default."""
        return list(self._served)

    def get(self, name: str | None) -> ServedModel:
        """The model of a name, or the default one. Raises the 422 problem for an unknown name."""
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

    def load(self, asked: str) -> ServedModel:
        """Load a model that the operator names: a file of `model_dir`, a shipped name, or a path.

        Returns:
            the model on all devices, to be served under a path's file name without its ending.

        Raises:
            ValueError, TypeError, OSError, RuntimeError, WorkerDied: it does not load.
        """
        source = asked
        if _NAME.fullmatch(asked) and (found := self._in_model_dir(asked)) is not None:
            source = str(found)
        # One at a time: two models being read at once would need their memory at once.
        with self._loading:
            number = next(self._numbers)
            if are_processes(self._devices):
                self._copies[number] = ModelCopy(source)
            try:
                predictor = self._load_everywhere(number, source)
            except BaseException:
                self._forget(number)
                raise
            info = predictor.info
            model = ServedModel(_served_name(asked), number, info, self._preparer(predictor))
            weakref.finalize(model, self._forget, number).atexit = False
            return model

    def _load_everywhere(self, number: int, source: str) -> "Predictor":
        """On all devices side by side; the predictor of this process."""
        copy = self._copies.get(number)
        path = source if copy is None else copy.path
        with ThreadPoolExecutor(len(self._devices) + 1) as pool:
            loads = [pool.submit(device.load, number, path) for device in self._devices]
            # Workers' processes give none back; theirs may hold a GPU that this one must not.
            here = None if copy is None else pool.submit(self._load, path, "cpu")
            try:
                local = [predictor for load in loads if (predictor := load.result()) is not None]
                return local[0] if here is None else here.result()
            except Exception as error:
                if copy is not None:
                    copy.own_words(error)
                raise

    def _preparer(self, predictor: "Predictor") -> "Callable[[Any], PreparedImage]":
        # All devices are of one kind, so that what one shares any of them can read.
        device = self._devices[0]
        return lambda picture: device.share(predictor.prepare(picture))

    def _forget(self, number: int) -> None:
        for device in self._devices:
            device.forget(number)
        if number in self._copies:
            self._copies.pop(number).close()

    def close(self) -> None:
        """Leave nothing on the disk; no worker is started after that."""
        for copy in list(self._copies.values()):
            copy.close()

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

    def serve(self, model: ServedModel) -> None:
        """Answer with this model under its name from now on."""
        # A new dict, so that a request's thread never meets one that changes.
        self._served = {**self._served, model.name: model}
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
