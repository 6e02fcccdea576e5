"""The pyramid against torchvision's, in float64."""

from collections import OrderedDict

import pytest
import torch
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from dsg.model.network.fpn import FeaturePyramid

CHANNELS = (5, 6, 7, 9)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(16, 24), (8, 12), (4, 6), (2, 3)], id="halves"),
        pytest.param([(19, 25), (10, 13), (5, 7), (3, 4)], id="odd sides"),
        pytest.param([(8, 8), (4, 4), (2, 2), (1, 1)], id="one cell"),
    ],
)
def test_equals_torchvision(sizes):
    torch.manual_seed(0)
    pyramid = FeaturePyramid(CHANNELS, out_channels=8).double()
    reference = FeaturePyramidNetwork(list(CHANNELS), 8, LastLevelMaxPool()).double()
    with torch.no_grad():
        for conv in (*pyramid.inner, *pyramid.outer):
            conv.bias.normal_()
    renamed = {
        name.replace("inner.", "inner_blocks.").replace("outer.", "layer_blocks."): tensor
        for name, tensor in pyramid.state_dict().items()
    }
    reference.load_state_dict(
        {f"{name.rpartition('.')[0]}.0.{name.rpartition('.')[2]}": tensor for name, tensor in renamed.items()}
    )
    features = [
        torch.randn(2, count, *size, dtype=torch.float64, requires_grad=True)
        for count, size in zip(CHANNELS, sizes, strict=True)
    ]

    levels = pyramid(features)
    expected = list(reference(OrderedDict((str(i), level) for i, level in enumerate(features))).values())

    assert [level.shape[-2:] for level in levels[:4]] == [torch.Size(size) for size in sizes]
    assert len(levels) == len(expected) == 5
    for level, expected_level in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, expected_level, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(sum(level.square().sum() for level in levels), features)
    expected_gradients = torch.autograd.grad(sum(level.square().sum() for level in expected), features)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_names_and_initial_values():
    pyramid = FeaturePyramid((4, 8, 16, 32), out_channels=64)
    convolutions = {f"{part}.{level}" for part in ("inner", "outer") for level in range(4)}
    kinds = ("weight", "bias")
    assert set(pyramid.state_dict()) == {f"{name}.{kind}" for name in convolutions for kind in kinds}
    assert all(not conv.bias.any() for conv in (*pyramid.inner, *pyramid.outer))
    # uniform in +-sqrt(3 / fan_in): fan_in is 64 * 9 in the 3x3 convolutions
    bound = (3 / (64 * 9)) ** 0.5
    assert 0.99 * bound < pyramid.outer[0].weight.abs().max() <= bound


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="in_channels is empty"):
        FeaturePyramid(())
    with pytest.raises(ValueError, match="got 1 levels: give 4"):
        FeaturePyramid(CHANNELS)([torch.zeros(1, 5, 4, 4)])
