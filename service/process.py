"""What a process that serves asks of its machine."""

import contextlib


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
