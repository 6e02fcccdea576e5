import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from dsg.model.network.anchors import AnchorGenerator


def levels(height: int, width: int):
    """Empty features of a padded picture; P6 is rounded up, as a stride-2 pool rounds."""
    return [torch.zeros(1, 1, -(-height // 2**level), -(-width // 2**level)) for level in range(2, 7)]


def test_one_cell_by_hand():
    anchors = AnchorGenerator(((32.0,),) * 5, (0.5, 1.0, 2.0), False, False)(levels(64, 64), (64, 64), torch.float64)
    assert anchors[4].shape == (3, 4)
    half = 32 / 2
    square = torch.tensor([-half, -half, half, half], dtype=torch.float64)
    assert torch.allclose(anchors[4][1], square)
    wide, tall = anchors[4][0], anchors[4][2]
    assert float(wide[2] - wide[0]) == pytest.approx(32 * 2**0.5) and float(wide[3] - wide[1]) == pytest.approx(
        32 / 2**0.5
    )
    assert torch.allclose(tall, wide[[1, 0, 3, 2]])
    # the second cell of the finest level lies 4 pixels to the right
    assert torch.allclose(anchors[0][3:6], anchors[0][:3] + torch.tensor([4.0, 0, 4, 0], dtype=torch.float64))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 224), (800, 608)])
def test_torchvisions_conventions(height, width):
    sizes, ratios = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), (0.5, 1.0, 2.0)
    features = levels(height, width)
    theirs = TorchvisionAnchors(sizes, (ratios,) * 5)(
        ImageList(torch.zeros(1, 3, height, width), [(height, width)]), features
    )
    ours = AnchorGenerator(sizes, ratios, True, True)(features, (height, width), torch.float32)
    assert torch.equal(torch.cat(ours), theirs[0])


def test_rows_of_the_head_belong_to_rows_of_the_anchors():
    """A head that answers its own position: row r of its output must be cell and anchor r."""
    from dsg.model.network.rpn import RPNHead

    generator = AnchorGenerator(((16.0, 24.0),) * 5, (0.5, 1.0), False, False)
    head = RPNHead(1, generator.per_cell)
    with torch.no_grad():
        head.conv.weight.zero_()
        head.conv.weight[0, 0, 1, 1] = 1
        head.objectness.weight.fill_(1)
        head.objectness.bias.copy_(torch.arange(4) * 1000.0)
    features = torch.arange(12.0).reshape(1, 1, 3, 4)  # cell number
    logits, deltas = head([features])
    assert logits[0][0].tolist() == [cell + 1000 * anchor for cell in range(12) for anchor in range(4)]
    assert deltas[0].shape == (1, 48, 4)


def test_half_precision_features_have_float32_anchors():
    generator = AnchorGenerator(((32.0,),) * 5, (1.0,), rounding=False, strides_from_grid=False)
    features = levels(64, 64)
    halves = generator([level.half() for level in features], (64, 64), torch.float16)
    for one, other in zip(halves, generator(features, (64, 64), torch.float32), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
