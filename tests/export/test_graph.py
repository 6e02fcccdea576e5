"""What is recorded of a network holds for every size of picture, and lies on one device."""

import pytest
import torch

from dsg.export.graph import ExportGraph, record
from dsg.model.network.build import build
from dsg.model.network.float32 import whole_float32


@pytest.mark.parametrize(
    ("preset", "half", "channels_last"),
    [
        ("dsg_lite0_fpn", False, True),
        ("dsg_lite0_fpn", True, False),
        pytest.param("dsg_r50_fpn", False, True, marks=pytest.mark.slow),
        pytest.param("dsg_r50_fpn", True, False, marks=pytest.mark.slow),
        pytest.param("cascade_dsg_lite0_fpn", False, True, marks=pytest.mark.slow),
        pytest.param("htc_dsg_lite0_fpn", False, True, marks=pytest.mark.slow),
    ],
)
def test_a_graph_for_all_sizes(preset, half, channels_last):
    network = build(preset, num_classes=3).eval()
    with whole_float32():
        program = record(ExportGraph(network, half, channels_last), torch.device("cpu"))
    images = next(node for node in program.graph.nodes if node.name == "images").meta["val"]
    assert [isinstance(side, torch.SymInt) for side in images.shape] == [True, False, True, True]
    # Numbers that were made a tensor would lie on the CPU whatever the device: a compiled package crashes on them.
    assert not program.graph_signature.lifted_tensor_constants
