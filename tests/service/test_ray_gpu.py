"""A replica on Ray takes a GPU, and serves from it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from ray_process import descendants, on_ray

PHOTO = Path(__file__).parents[2] / "docs/pictures/coco_sheet.jpg"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed"),
]


def test_a_replica_has_one_gpu_and_serves_from_it() -> None:
    with on_ray(model="dsg_lite0_coco", device=None, replicas="1") as server:
        for _ in range(3):
            response = server.post(PHOTO.read_bytes(), headers={"Content-Type": "image/jpeg"})
            assert response.status_code == 200 and response.json()["annotations"], response.text[:300]
        assert server.metric("dsg_device_up", device="cuda") == 1
        assert server.metric("dsg_gpu_memory_bytes", device="cuda", kind="allocated") > 0
        (replica,) = server.replicas()
        (worker,) = [pid for pid in descendants(replica) if b"dsg.service.worker" in command_of(pid)]
        environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
        visible = [entry for entry in environment if entry.startswith(b"CUDA_VISIBLE_DEVICES=")]
        assert len(visible) == 1 and b"," not in visible[0]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
