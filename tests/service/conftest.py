"""A server for the tests that only ask; those that block or break it make their own with `serving`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

# service_fakes.py lies beside the tests that share it
sys.path.insert(0, str(Path(__file__).parent))

from service_fakes import Server, serving

# The default draws a frame around every traceback, with all local variables: seconds for each.
structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
