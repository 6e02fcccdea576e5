"""From settings to devices."""

import os
import sys

from dsg.service.devices import Device, LoadPredictor
from dsg.service.local_device import LocalDevice
from dsg.service.setting_checks import parts
from dsg.service.settings import Settings
from dsg.service.worker_device import WorkerDevice


def choose_devices(settings: Settings, load: LoadPredictor) -> list[Device]:
    """The devices that a server runs; worker processes are started at once, so that they are ready sooner.

    Raises:
        ValueError: an unknown device, or none where all GPUs are asked for.
    """
    names = _names(settings)
    if _kind(settings, names) == "thread":
        return [LocalDevice(name, load) for name in names]
    # Several workers on one CPU would wake all its cores at once.
    threads = max(1, (os.cpu_count() or 1) // len(names))
    return [WorkerDevice(name or "cpu", load, 0 if (name or "cpu").startswith("cuda") else threads) for name in names]


def _names(settings: Settings) -> list[str | None]:
    if settings.devices is None:
        if settings.device is None and _cuda_devices():
            return ["cuda"]
        return [settings.device]
    if settings.devices.strip() == "all":
        names = [f"cuda:{index}" for index in range(_cuda_devices())]
        if not names:
            raise ValueError("devices is all, and no GPU is to be seen; name them, or use device cpu")
        return [*names]
    return [*parts(settings.devices)]


def _kind(settings: Settings, names: list[str | None]) -> str:
    if not sys.platform.startswith("linux"):
        return "thread"  # pixels are shared by a call that Linux alone has
    if settings.workers is not None:
        return settings.workers
    if any(model.endswith(".pt2") for model in settings.models):
        return "thread"  # compiled for its device: this process could not load it on the CPU to prepare pictures
    return "process" if len(names) > 1 or (names[0] or "").startswith("cuda") else "thread"


def _cuda_devices() -> int:
    try:
        import torch
    except ImportError:
        return 0
    from dsg.ops.diagnosis import gpu_problem  # says once why a GPU that is there is not used, when a model is loaded

    return torch.cuda.device_count() if gpu_problem() is None and torch.cuda.is_available() else 0
