"""What every test gets: fixed seeds, no settings from outside, no GPU test without a GPU."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Small tensors: a machine with many cores loses more by waking them than it gains.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever runs the tests may have DSG_MODEL or DSG_PORT set; a test that needs one sets it itself."""
    for name in list(os.environ):
        if name.startswith("DSG_"):
            monkeypatch.delenv(name)
    yield
