"""Mask heads: the shortcuts of test time against all layers run plainly."""

import pytest
import torch
from torch.nn import functional

from dsg.model.network import heads
from dsg.model.network.heads import Fusion, MaskHead


def mask_head(outputs: int) -> MaskHead:
    torch.manual_seed(0)
    head = MaskHead(8, outputs).double().eval()
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.predictor.bias)
    return head


def plain(head: MaskHead, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer after layer on all RoIs, all outputs."""
    for conv in head.convs:
        features = functional.relu(conv(features))
    return head.predictor(functional.relu(head.deconv(features))), features


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_output_of_each_roi_is_that_channel_of_all_outputs(layout):
    head = mask_head(5).to(memory_format=layout)
    features = torch.randn(7, 8, 14, 14, dtype=torch.float64).contiguous(memory_format=layout)
    labels = torch.tensor([4, 0, 1, 1, 3, 2, 4])
    logits, hidden = head(features, labels)
    expected, expected_hidden = plain(head, features)
    assert logits.shape == (7, 1, 28, 28)
    torch.testing.assert_close(logits[:, 0], expected[torch.arange(7), labels], rtol=0, atol=1e-9)
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_rois_in_parts_are_the_rois_at_once(count, monkeypatch):
    monkeypatch.setattr(heads, "_ROIS_AT_ONCE_CPU", 3)
    head = mask_head(4)
    features = torch.randn(count, 8, 14, 14, dtype=torch.float64)
    before = features.clone()
    labels = torch.arange(count) % 4
    expected, expected_hidden = plain(head, features)
    for found, wanted in (
        (head(features)[0], expected),
        (head(features)[1], expected_hidden),
        (head(features, labels)[0], expected[torch.arange(count), labels][:, None]),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert torch.equal(features, before)


@torch.no_grad()
def test_fusion_leaves_what_it_is_given():
    fusion = Fusion(8, 3, activation=True).double()
    features, mask_features = torch.randn(2, 4, 8, 14, 14, dtype=torch.float64)
    copies = features.clone(), mask_features.clone()
    fused = fusion(features[..., ::2, ::2], mask_features)
    added = functional.relu(functional.conv2d(mask_features, fusion.conv.weight, fusion.conv.bias, padding=1))
    expected = features[..., ::2, ::2] + functional.avg_pool2d(added, 2)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-9)
    assert torch.equal(features, copies[0]) and torch.equal(mask_features, copies[1])


@torch.no_grad()
def test_an_exported_graph_holds_each_layer_once(monkeypatch):
    monkeypatch.setattr(heads, "_ROIS_AT_ONCE_CPU", 3)
    head, features, labels = mask_head(4), torch.randn(7, 8, 14, 14, dtype=torch.float64), torch.arange(7) % 4
    exported = torch.export.export(head, (features, labels), strict=False)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("conv2d" in name for name in names) == 4
    assert sum("conv_transpose2d" in name for name in names) == 1
    found = exported.module()(features, labels)
    torch.testing.assert_close(found[0], head(features, labels)[0], rtol=0, atol=1e-9)
