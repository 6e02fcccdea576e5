"""The tests of hostile inputs, against two replicas on Ray."""

from collections.abc import Iterator

import pytest
import test_hostile_inputs
from ray_process import NEEDS_RAY, RayServer, on_ray
from service_fakes import RELOAD_KEY
from shared_tests import shared_with

pytestmark = NEEDS_RAY

# A part of the corpus will do: what takes pictures apart is the same code.
globals().update(shared_with(test_hostile_inputs, "small", but=["test_the_whole_corpus"]))


@pytest.fixture(scope="module")
def small() -> Iterator[RayServer]:
    with on_ray(max_bytes=500_000, max_pixels=2_000_000, max_pictures=4, reload_key=RELOAD_KEY) as running:
        yield running
