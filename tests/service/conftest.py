"""What several files of tests use as it is: a server that is only asked, a worker, metrics, a network."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

# service_fakes.py lies beside the tests that share it
sys.path.insert(0, str(Path(__file__).parent))

from service_fakes import FakePredictor, Server, load_faulty, serving

from dsg.service.metrics import Metrics
from dsg.service.worker_device import WorkerDevice

# The default draws a frame around every traceback, with all local variables: seconds for each.
structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def device() -> Iterator[WorkerDevice]:
    device = WorkerDevice("cpu", load_faulty, threads=1)
    device.start()
    device.load(0, "fake")
    yield device
    device.close()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def predictor() -> FakePredictor:
    return FakePredictor()
