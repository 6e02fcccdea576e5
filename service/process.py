"""What a process that serves asks of its machine."""

import contextlib
import sys

_SWITCH_S = 0.0005  # Python's own 5 ms are as long as a picture takes to decode


def take_turns_quickly() -> None:
    """Let no thread that computes keep Python's lock for long while the event loop, or a device, waits for it."""
    sys.setswitchinterval(_SWITCH_S)


def one_core_a_thread() -> None:
    """Torch would resize each picture on all cores, and there are as many pictures as threads."""
    try:
        import torch
    except ImportError:  # an exported model runs without it
        return
    torch.set_num_threads(1)


def allow_many_files() -> None:
    """As many descriptors as this process may have: each connection is one, and each picture on its way to a worker."""
    try:
        import resource
    except ImportError:  # not made for Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
