"""The tests of what the endpoints answer, of the client and of what operators set, against two replicas on Ray."""

from collections.abc import Iterator

import pytest
import test_service_answers
import test_service_client
import test_service_operations
from ray_process import NEEDS_RAY, RayServer, on_ray
from shared_tests import shared_with

pytestmark = NEEDS_RAY

# There without the label that says which replica; below with it.
globals().update(shared_with(test_service_answers, "server", but=["test_metrics_count_what_was_asked"]))
globals().update(shared_with(test_service_client, "server"))
globals().update(shared_with(test_service_operations, "server"))
globals().update(shared_with(test_service_operations, "guarded"))


@pytest.fixture(scope="module")
def server() -> Iterator[RayServer]:
    with on_ray() as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[RayServer]:
    keys = ", ".join(test_service_operations.KEYS)
    with on_ray(api_keys=keys, cors_origins="https://example.org") as running:
        yield running


def test_metrics_are_of_all_replicas(server: RayServer) -> None:
    before = server.metric("dsg_batched_pictures_total", shape="64x96")
    for _ in range(8):
        assert server.post(test_service_answers.encoded(test_service_answers.picture())).status_code == 200
    server.await_metric("dsg_batched_pictures_total", before + 8, shape="64x96")
    samples = server.running.metrics()
    assert len({name for name in samples if name.startswith("dsg_model_info{") and 'name="fake"' in name}) == 2
    text = server.client.get("/metrics").text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
