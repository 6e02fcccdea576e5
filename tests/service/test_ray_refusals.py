"""The tests of every refusal, against two replicas on Ray."""

from collections.abc import Iterator

import pytest
import test_service_refusals
from ray_process import NEEDS_RAY, RayServer, on_ray
from service_fakes import RELOAD_KEY
from shared_tests import shared_with

pytestmark = NEEDS_RAY

globals().update(shared_with(test_service_refusals, "small"))


@pytest.fixture(scope="module")
def small() -> Iterator[RayServer]:
    with on_ray(max_bytes=20_000, max_pixels=10_000, max_pictures=3, reload_key=RELOAD_KEY) as running:
        yield running
