"""Steps that replay CUDA graphs against steps that do not."""

import copy

import pytest
import torch

from dsg.model.network.build import build
from dsg.model.training.graphs import capture

pytestmark = pytest.mark.gpu


def scene(seed: int, count: int = 4):
    torch.manual_seed(seed)
    images = [torch.rand(3, 128, 128, device="cuda") for _ in range(count)]
    targets = []
    for _ in images:
        corner = torch.rand(3, 2) * 60
        boxes = torch.cat([corner, corner + torch.rand(3, 2) * 50 + 10], dim=1).cuda()
        masks = torch.zeros(3, 128, 128, dtype=torch.uint8, device="cuda")
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.randint(1, 4, (3,)).cuda(), "masks": masks})
    return images, targets


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_replayed_steps_are_the_steps(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # TF32 keeps ten bits of a number, and graphs may choose other kernels.
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    torch.manual_seed(0)
    plain = build("dsg_lite0_fpn", 3, channels=64, proposals_train=50).cuda().train()
    plain.to(memory_format=torch.channels_last)
    graphed = copy.deepcopy(plain)
    assert capture(graphed, 4, 128, precision)
    optimisers = [torch.optim.SGD(model.parameters(), 1e-3) for model in (plain, graphed)]
    for step in range(3):
        images, targets = scene(step)
        losses, grads = [], []
        for model, optimiser in zip((plain, graphed), optimisers, strict=True):
            torch.manual_seed(step)
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                found = model(images, targets)
            sum(found.values()).backward()
            losses.append({name: loss.item() for name, loss in found.items()})
            grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
            optimiser.step()
        loose = 1e-3 if precision == torch.float32 else 5e-2
        assert losses[1] == pytest.approx(losses[0], rel=loose, abs=loose)
        assert len(grads[0]) == len(grads[1])
        norms = [torch.stack([grad.float().norm() for grad in one]) for one in grads]
        torch.testing.assert_close(norms[1].norm(), norms[0].norm(), rtol=loose, atol=0)
    for model in (plain, graphed):
        model.eval()
    with torch.no_grad():  # other sizes and numbers of pictures than the graphs'
        found = [model([torch.ones(3, 96, 160, device="cuda") / 2]) for model in (plain, graphed)]
    assert len(found[0]) == len(found[1]) == 1


def test_what_cannot_be_captured_is_left_alone() -> None:
    assert not capture(torch.nn.Linear(2, 2).cuda(), 2, 64, torch.float32)
    with_norms = build("dsg_lite0_fpn", 3).cuda()
    with_norms.rpn_head.add_module("norm", torch.nn.BatchNorm2d(4))
    assert not capture(with_norms, 2, 64, torch.float32)
