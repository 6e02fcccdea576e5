"""ResNet against torchvision, EfficientNet-Lite against its table written out, frozen norms against
`BatchNorm2d`, weight files that fit and that do not."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from dsg.model.network.backbones import (
    BackboneWithPyramid,
    backbone_channels,
    backbone_normalisation,
    load_backbone_weights,
)
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.fpn import FeaturePyramid
from dsg.model.network.norm import FrozenBatchNorm2d
from dsg.model.network.resnet import ResNet

WEIGHTS_DIR = os.environ.get("DSG_WEIGHTS_DIR")  # read here: while a test runs, DSG_* variables are hidden

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


# ---- frozen batch norm


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_frozen_norm_equals_batch_norm_in_eval_mode(training, eps):
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(6, eps=eps).double().eval()
    randomise_norms(reference)
    reference.running_var[0] = 0  # a dead channel, as ImageNet weights have them
    norm = FrozenBatchNorm2d(6, eps=eps).double().train()
    norm.load_state_dict(reference.state_dict())  # with num_batches_tracked
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=training)

    torch.testing.assert_close(norm(x), reference(x), rtol=1e-12, atol=1e-12)
    if training:
        upstream = torch.randn(2, 6, 5, 7, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(norm(x), x, upstream)
        (expected,) = torch.autograd.grad(reference(x), x, upstream)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_frozen_norm_has_no_parameters_and_no_counter():
    norm = FrozenBatchNorm2d(4)
    assert not list(norm.parameters())
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    norm.load_state_dict(norm.state_dict())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_norm_keeps_dtype_and_memory_format(requires_grad, dtype, memory_format):
    norm = FrozenBatchNorm2d(8)
    randomise_norms(norm)
    x = torch.randn(2, 8, 6, 5).to(dtype).contiguous(memory_format=memory_format)
    x.requires_grad_(requires_grad)
    out = norm(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    # a few roundings of values below 8
    torch.testing.assert_close(out.float(), norm(x.float()), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_frozen_norm_keeps_no_feature_map_for_the_backward_pass():
    norm = FrozenBatchNorm2d(8)
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norm(x)
    assert sum(kept) <= 8  # the scale


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
    body = BackboneWithPyramid(backbone, FeaturePyramid(backbone_channels(backbone), out_channels=8))
    levels = body(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 16, 24),
        (2, 8, 8, 12),
        (2, 8, 4, 6),
        (2, 8, 2, 3),
        (2, 8, 1, 2),
    ]
    assert body.strides == (4, 8, 16, 32, 64)
    assert body.out_channels == 8


def test_gradients_reach_trained_stages_only():
    backbone = ResNet(50, frozen_stages=2)
    body = BackboneWithPyramid(backbone, FeaturePyramid(backbone.out_channels, out_channels=8)).train()
    sum(level.sum() for level in body(torch.rand(1, 3, 64, 64))).backward()
    for name, parameter in body.named_parameters():
        frozen = name.startswith(("backbone.conv1", "backbone.layer1"))
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
    body = BackboneWithPyramid(OwnBackbone(), FeaturePyramid((3, 3, 3, 3), 4))
    body.backbone.forward = lambda images: images
    with pytest.raises(TypeError, match="returned Tensor: return "):
        body(torch.zeros(1, 3, 64, 64))
    body.backbone.forward = lambda images: [images] * 5
    with pytest.raises(TypeError, match="returned 5 levels"):
        body(torch.zeros(1, 3, 64, 64))


# ---- weight files


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(1)
    net = EfficientNetLite(0)
    randomise_norms(net)
    return net


def same_tensors(module, other, tolerance=0.0):
    expected = other.state_dict()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_loads_half_precision_safetensors(lite, tmp_path):
    state = {name: t.half() if t.ndim == 4 else t for name, t in lite.state_dict().items()}
    state["conv_head.weight"] = torch.zeros(1280, 320, 1, 1)
    state["bn1.weight"] = torch.zeros(1280)
    save_file(state, tmp_path / "lite0.safetensors")
    net = EfficientNetLite(0)
    assert load_backbone_weights(net, tmp_path / "lite0.safetensors") == ["bn1.weight", "conv_head.weight"]
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32}
    same_tensors(net, lite, tolerance=1e-3)


def test_loads_names_with_underscores(lite, tmp_path):
    state = {}
    for name, tensor in lite.state_dict().items():
        *modules, kind = name.split(".")
        state[".".join([*(part if part.isdigit() else f"_{part}" for part in modules), kind])] = tensor
    state["_fc.bias"] = torch.zeros(1000)
    assert "_blocks.3._expand_conv.weight" in state
    torch.save(state, tmp_path / "lite0.pth")
    net = EfficientNetLite(0)
    assert load_backbone_weights(net, str(tmp_path / "lite0.pth")) == ["fc.bias"]
    same_tensors(net, lite)


def test_loads_a_torchvision_resnet(tmp_path):
    reference = torchvision.models.resnet50(weights=None)
    randomise_norms(reference)
    torch.save(reference.state_dict(), tmp_path / "resnet50.pth")
    net = ResNet(50)
    assert load_backbone_weights(net, tmp_path / "resnet50.pth") == ["fc.bias", "fc.weight"]
    expected = reference.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_loads_into_an_own_backbone_with_trained_norms(tmp_path):
    source, net = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "with.pth")
    without = {name: t for name, t in source.state_dict().items() if "num_batches" not in name}
    save_file(without, tmp_path / "without.safetensors")
    for file in ("with.pth", "without.safetensors"):
        assert load_backbone_weights(net, tmp_path / file) == []
        assert torch.equal(net[0].weight, source[0].weight)


def test_weight_files_that_do_not_fit(lite, tmp_path):
    before = {name: tensor.clone() for name, tensor in lite.state_dict().items()}

    def refused(state, message):
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone_weights(lite, tmp_path / "file.pth")
        assert "\n" not in str(caught.value)

    without = {name: tensor for name, tensor in before.items() if name != "bn0.bias"}
    refused(without, r"does not fit EfficientNetLite: it lacks bn0\.bias$")
    refused({**before, "neck.weight": torch.zeros(1)}, "it has neck.weight besides")
    refused({**before, "bn0.bias": torch.zeros(5)}, r"bn0.bias is \(5,\), not \(32,\)")
    refused({}, r"it lacks .* and \d+ more")
    refused({"state_dict": before}, "holds no plain state dict")
    refused([1, 2], "holds no plain state dict")
    refused({"bn0.bias": Path("x")}, "not a weight file")  # code in a pickle is never run
    with pytest.raises(ValueError, match="there is no weight file"):
        load_backbone_weights(lite, tmp_path / "absent.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("neither of the two\n")
        with pytest.raises(ValueError, match=r"is not a weight file, or a broken one: .+") as caught:
            load_backbone_weights(lite, tmp_path / name)
        assert "\n" not in str(caught.value)
    for name, tensor in lite.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.skipif(not WEIGHTS_DIR, reason="DSG_WEIGHTS_DIR names no folder of weights")
@pytest.mark.parametrize("variant", [0, 2])
def test_loads_imagenet_weights(variant):
    net = EfficientNetLite(variant)
    path = Path(WEIGHTS_DIR) / f"efficientnet_lite{variant}_imagenet_backbone.safetensors"
    left_aside = load_backbone_weights(net, path)
    assert {name.partition(".")[0] for name in left_aside} == {"conv_head", "bn1"}
    with torch.no_grad():
        features = net(torch.randn(1, 3, 64, 64))
    assert all(level.isfinite().all() and level.std() > 0.1 for level in features)
