"""Weight files that fit a backbone, and files that do not."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from dsg.model.network.backbones import load_backbone_weights
from dsg.model.network.efficientnet_lite import EfficientNetLite
from dsg.model.network.resnet import ResNet

WEIGHTS_DIR = os.environ.get("DSG_WEIGHTS_DIR")  # read here: while a test runs, DSG_* variables are hidden


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(1)
    net = EfficientNetLite(0)
    for buffer in net.buffers():
        buffer.uniform_(0.5, 1.5)
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
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight)
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
        assert "weights_only" not in str(caught.value)  # torch's advice to run what is in the file
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
