"""A server for the tests that only ask; those that block or break it make their own with `serving`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

# service_fakes.py lies beside the tests that share it
sys.path.insert(0, str(Path(__file__).parent))

from service_fakes import Server, serving

# structlog's default draws a frame around every traceback, with all local variables: seconds for each.
structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
