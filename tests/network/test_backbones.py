"""ResNet against torchvision, EfficientNet-Lite against its table written out, and any backbone under a
pyramid."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from dsg.model.network.backbones import (
    BackboneWithPyramid,
    backbone_channels,
    backbone_normalisation,
)
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.fpn import FeaturePyramid
from dsg.model.network.norm import FrozenBatchNorm2d
from dsg.model.network.resnet import ResNet

# (expand, kernel, stride, output channels) of every block
LITE_BLOCKS = {
    0: [
        *[(1, 3, 1, 16)],
        *[(6, 3, 2, 24), (6, 3, 1, 24)],
        *[(6, 5, 2, 40), (6, 5, 1, 40)],
        *[(6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80)],
        *[(6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112)],
        *[(6, 5, 2, 192), (6, 5, 1, 192), (6, 5, 1, 192), (6, 5, 1, 192)],
        *[(6, 3, 1, 320)],
    ],
    2: [
        *[(1, 3, 1, 16)],
        *[(6, 3, 2, 24), (6, 3, 1, 24), (6, 3, 1, 24)],
        *[(6, 5, 2, 48), (6, 5, 1, 48), (6, 5, 1, 48)],
        *[(6, 3, 2, 88), (6, 3, 1, 88), (6, 3, 1, 88), (6, 3, 1, 88)],
        *[(6, 5, 1, 120), (6, 5, 1, 120), (6, 5, 1, 120), (6, 5, 1, 120)],
        *[(6, 5, 2, 208), (6, 5, 1, 208), (6, 5, 1, 208), (6, 5, 1, 208), (6, 5, 1, 208)],
        *[(6, 3, 1, 352)],
    ],
}
LITE_FEATURES = {0: (2, 4, 10, 15), 2: (3, 6, 14, 20)}  # blocks whose outputs are C2 to C5


def randomise_norms(module: nn.Module) -> None:
    """Give every batch norm statistics and weights that matter and keep activations near their size."""
    for name, tensor in module.state_dict().items():
        kind = name.rpartition(".")[2]
        if kind == "running_var":
            tensor.uniform_(0.5, 1.5)
        elif kind in ("running_mean", "bias"):
            tensor.normal_(0, 0.2)
        elif kind == "weight" and tensor.ndim == 1:
            tensor.uniform_(0.3, 0.9)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- ResNet


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [
        pytest.param(torchvision.models.resnet50, {"depth": 50}, id="r50"),
        pytest.param(torchvision.models.resnet101, {"depth": 101}, id="r101"),
        pytest.param(
            torchvision.models.resnext50_32x4d,
            {"depth": 50, "groups": 32, "width_per_group": 4},
            id="x50_32x4d",
        ),
    ],
)
def test_resnet_equals_torchvision(reference, arguments):
    torch.manual_seed(0)
    expected_net = reference(weights=None).double().eval()
    randomise_norms(expected_net)
    net = ResNet(**arguments).double()
    state = expected_net.state_dict()
    net.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    images = torch.randn(1, 3, 75, 64, dtype=torch.float64)

    with torch.no_grad():
        features = net(images)
        x = expected_net.maxpool(expected_net.relu(expected_net.bn1(expected_net.conv1(images))))
        expected = []
        for layer in (expected_net.layer1, expected_net.layer2, expected_net.layer3, expected_net.layer4):
            x = layer(x)
            expected.append(x)

    assert len(features) == 4
    for level, expected_level in zip(features, expected, strict=True):
        assert (level - expected_level).abs().max() <= 1e-9 * expected_level.abs().max()
    assert [level.shape[1] for level in features] == list(net.out_channels)
    assert [tuple(level.shape[2:]) for level in features] == [(19, 16), (10, 8), (5, 4), (3, 2)]


@pytest.mark.parametrize(("depth", "millions"), [(50, 23.45), (101, 42.39)])
def test_resnet_counts_the_weights_of_convolutions_alone(depth, millions):
    with torch.device("meta"):
        reference = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        net = ResNet(depth)
    convolutions = sum(conv.weight.numel() for conv in reference.modules() if isinstance(conv, nn.Conv2d))
    assert parameter_count(net) == convolutions
    assert round(convolutions / 1e6, 2) == millions


@pytest.mark.parametrize("frozen_stages", range(6))
def test_resnet_freezes_leading_stages(frozen_stages):
    with torch.device("meta"):
        net = ResNet(50, frozen_stages=frozen_stages)
    stages = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    trains = {(name.partition(".")[0], parameter.requires_grad) for name, parameter in net.named_parameters()}
    assert trains == {(stage, index >= frozen_stages) for index, stage in enumerate(stages)}


def test_resnet_stride_in_1x1():
    with torch.device("meta"):
        net = ResNet(50, stride_in_1x1=True)
        assert [level.shape[-1] for level in net(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2]
    for layer in (net.layer2, net.layer3, net.layer4):
        assert layer[0].conv1.stride == (2, 2)
        assert layer[0].conv2.stride == (1, 1)


def test_resnet_says_what_is_wrong():
    with pytest.raises(ValueError, match="depth 34 is unknown"):
        ResNet(34)
    with pytest.raises(ValueError, match="frozen_stages is 6"):
        ResNet(50, frozen_stages=6)


# ---- EfficientNet-Lite


def lite_by_hand(variant, state, images):
    """Features from the table above with bare functions: no module, no loop over stages."""

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    x = norm(F.conv2d(images, state["conv_stem.weight"], stride=2, padding=1), "bn0").clamp(0, 6)
    features = []
    for index, (expand, kernel, stride, channels) in enumerate(LITE_BLOCKS[variant]):
        block = f"blocks.{index}"
        out = x
        if expand > 1:
            out = norm(F.conv2d(out, state[f"{block}.expand_conv.weight"]), f"{block}.bn0").clamp(0, 6)
        weight = state[f"{block}.depthwise_conv.weight"]
        assert weight.shape == (x.shape[1] * expand, 1, kernel, kernel)
        out = F.conv2d(out, weight, stride=stride, padding=kernel // 2, groups=len(weight))
        out = norm(out, f"{block}.bn1").clamp(0, 6)
        out = norm(F.conv2d(out, state[f"{block}.project_conv.weight"]), f"{block}.bn2")
        x = x + out if stride == 1 and x.shape[1] == channels else out
        if index in LITE_FEATURES[variant]:
            features.append(x)
    return features


@pytest.mark.parametrize("variant", [0, 2])
def test_lite_equals_its_table(variant):
    torch.manual_seed(0)
    net = EfficientNetLite(variant).double()
    randomise_norms(net)
    images = torch.randn(1, 3, 75, 64, dtype=torch.float64)
    with torch.no_grad():
        features = net(images)
        expected = lite_by_hand(variant, net.state_dict(), images)
    assert len(net.blocks) == len(LITE_BLOCKS[variant])
    assert [level.shape[1] for level in features] == list(net.out_channels)
    assert [tuple(level.shape[2:]) for level in features] == [(19, 16), (10, 8), (5, 4), (3, 2)]
    for level, expected_level in zip(features, expected, strict=True):
        assert (level - expected_level).abs().max() <= 1e-9 * expected_level.abs().max()


@pytest.mark.parametrize(
    ("variant", "channels", "convolutions", "with_norms"),
    [(0, (24, 40, 112, 320), 2_919_392, 2_958_848), (2, (24, 48, 120, 352), 4_302_416, 4_357_952)],
)
def test_lite_channels_and_counts(variant, channels, convolutions, with_norms):
    with torch.device("meta"):
        net = EfficientNetLite(variant)
    assert net.out_channels == channels
    assert parameter_count(net) == convolutions
    affine = sum(norm.weight.numel() * 2 for norm in net.modules() if isinstance(norm, FrozenBatchNorm2d))
    assert convolutions + affine == with_norms
    # the classifier's 1x1 convolution to 1280 channels and its norm make up the usual 3.4 M and 4.8 M
    assert round((with_norms + channels[-1] * 1280 + 2 * 1280) / 1e6, 1) == {0: 3.4, 2: 4.8}[variant]


@pytest.mark.parametrize("variant", [0, 2])
def test_lite_of_random_weights_keeps_its_signal(variant):
    """What heads see of two images differs, at every level, by about as much as the images do."""
    backbone = EfficientNetLite(variant)
    with torch.no_grad():
        for level in backbone(torch.randn(2, 3, 128, 128)):
            assert 0.3 < level.std() < 30
            assert 0.1 < (level[0] - level[1]).std() < 30


@pytest.mark.parametrize("frozen_blocks", [0, 1, 3, 16])
def test_lite_freezes_leading_blocks(frozen_blocks):
    with torch.device("meta"):
        net = EfficientNetLite(0, frozen_blocks=frozen_blocks)
    assert net.conv_stem.weight.requires_grad == (frozen_blocks == 0)
    for index, block in enumerate(net.blocks):
        assert {parameter.requires_grad for parameter in block.parameters()} == {index >= frozen_blocks}


def test_lite_says_what_is_wrong():
    with pytest.raises(ValueError, match="variant 1 is unknown"):
        EfficientNetLite(1)
    with pytest.raises(ValueError, match="frozen_blocks is 17: use 0 "):
        EfficientNetLite(0, frozen_blocks=17)


# ---- backbone and pyramid together


class OwnBackbone(nn.Module):
    """Four levels of the right strides, with nothing learned."""

    out_channels = (3, 3, 3, 3)

    def forward(self, images):
        return [F.avg_pool2d(images, stride) for stride in (4, 8, 16, 32)]


class TimmLike(nn.Module):
    """What `timm.create_model(..., features_only=True)` shows of itself."""

    def __init__(self, strides):
        super().__init__()
        self.feature_info = self
        self.strides = strides
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}

    def channels(self):
        return [8, 16, 24, 32]

    def reduction(self):
        return self.strides


@pytest.mark.parametrize("make", [lambda: EfficientNetLite(0), OwnBackbone], ids=["lite0", "own"])
def test_pyramid_levels(make):
    backbone = make()
    net = BackboneWithPyramid(backbone, FeaturePyramid(backbone_channels(backbone), out_channels=8))
    levels = net(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 16, 24),
        (2, 8, 8, 12),
        (2, 8, 4, 6),
        (2, 8, 2, 3),
        (2, 8, 1, 2),
    ]
    assert net.strides == (4, 8, 16, 32, 64)
    assert net.out_channels == 8


def test_gradients_reach_trained_stages_only():
    backbone = ResNet(50, frozen_stages=2)
    net = BackboneWithPyramid(backbone, FeaturePyramid(backbone.out_channels, out_channels=8)).train()
    sum(level.sum() for level in net(torch.rand(1, 3, 64, 64))).backward()
    for name, parameter in net.named_parameters():
        frozen = name.startswith(("body.conv1", "body.layer1"))
        assert (parameter.grad is None) == frozen, name


def test_channels_and_normalisation_of_a_timm_model():
    backbone = TimmLike([4, 8, 16, 32])
    assert backbone_channels(backbone) == (8, 16, 24, 32)
    assert backbone_normalisation(backbone) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    with pytest.raises(ValueError, match=r"has strides \(2, 4, 8, 16, 32\): choose its out_indices"):
        backbone_channels(TimmLike([2, 4, 8, 16, 32]))


def test_normalisation_belongs_to_the_backbone():
    with torch.device("meta"):
        assert backbone_normalisation(ResNet(50)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        mean, std = backbone_normalisation(EfficientNetLite(0))
    white = (1 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(white, torch.full((3,), (255 - 127) / 128))
    assert backbone_normalisation(OwnBackbone()) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="Identity does not say its channels"):
        backbone_channels(nn.Identity())
    own = OwnBackbone()
    own.out_channels = (3, 3, 3)
    with pytest.raises(ValueError, match=r"out_channels of backbone OwnBackbone is \(3, 3, 3\)"):
        backbone_channels(own)
    with pytest.raises(ValueError, match="the pyramid takes"):
        BackboneWithPyramid(OwnBackbone(), FeaturePyramid((3, 3, 3, 4)))
    net = BackboneWithPyramid(OwnBackbone(), FeaturePyramid((3, 3, 3, 3), 4))
    net.body.forward = lambda images: images
    with pytest.raises(TypeError, match="returned Tensor: return "):
        net(torch.zeros(1, 3, 64, 64))
    net.body.forward = lambda images: [images] * 5
    with pytest.raises(TypeError, match="returned 5 levels"):
        net(torch.zeros(1, 3, 64, 64))
