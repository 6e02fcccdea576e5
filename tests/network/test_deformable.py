"""Deformable convolutions against plain ones and a slow loop, and ResNeXt against torchvision's."""

import pytest
import torch
import torchvision
from torch.nn import functional

from dsg.model.network.backbones import load_backbone_weights
from dsg.model.network.deformable import DeformableConv
from dsg.model.network.resnet import ResNet


@pytest.mark.parametrize(("modulated", "stride", "groups"), [(False, 1, 1), (True, 2, 4)])
def test_a_fresh_one_is_a_plain_convolution(modulated, stride, groups):
    conv = DeformableConv(8, 12, stride, groups, modulated).double()
    x = torch.rand(2, 8, 9, 7, dtype=torch.float64)
    plain = functional.conv2d(x, conv.weight, stride=stride, padding=1, groups=groups)
    torch.testing.assert_close(conv(x), plain * (0.5 if modulated else 1.0))


def test_moved_points_by_a_slow_loop():
    torch.manual_seed(0)
    conv = DeformableConv(2, 3, 1, 1, True).double()
    torch.nn.init.normal_(conv.offset.weight, std=0.3)
    x = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    moved = conv.offset(x)[0]
    found = conv(x)[0]
    padded = functional.pad(x[0], (8, 8, 8, 8))
    for row, column in ((0, 0), (2, 3), (4, 5)):
        total = torch.zeros(3, dtype=torch.float64)
        for point in range(9):
            y = row + point // 3 - 1 + float(moved[2 * point, row, column].detach()) + 8
            x_ = column + point % 3 - 1 + float(moved[2 * point + 1, row, column].detach()) + 8
            y0, x0 = int(y // 1), int(x_ // 1)
            value = sum(
                padded[:, y0 + dy, x0 + dx] * (1 - abs(y - y0 - dy)) * (1 - abs(x_ - x0 - dx))
                for dy in (0, 1)
                for dx in (0, 1)
            )
            weight = moved[18 + point, row, column].detach().sigmoid()
            total += (conv.weight.detach().flatten(2)[:, :, point] @ value) * weight
        torch.testing.assert_close(found[:, row, column].detach(), total)


def test_plain_weights_fill_a_deformable_resnext(tmp_path):
    """torchvision's ResNeXt, its features, and a deformable one that starts from its weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnext101_64x4d(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnext.pth")
    ours = ResNet(101, groups=64, width_per_group=4, deformable=True).eval()
    load_backbone_weights(ours, tmp_path / "resnext.pth")
    assert not ours.layer3[0].conv2.offset.weight.any()
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(picture)))))
        wanted = theirs.layer4(theirs.layer3(theirs.layer2(wanted)))
        torch.testing.assert_close(ours(picture)[-1], wanted, rtol=1e-4, atol=1e-4)
