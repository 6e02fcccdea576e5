"""Parameter groups, learning rates and the moving average against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from dsg.model.training.config import OptimizerConfig, ScheduleConfig
from dsg.model.training.ema import Ema
from dsg.model.training.optim import Schedule, build_optimizer, clip_gradients, set_learning_rate


def rates(model, optimizer):
    """name -> (lr, weight decay)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_groups_of_maskrcnn_benchmark(tiny_detector):
    model = tiny_detector()
    optimizer = build_optimizer(model, OptimizerConfig(), 16)
    assert isinstance(optimizer, torch.optim.SGD)
    assert rates(model, optimizer) == {
        "backbone.0.weight": (0.02, 1e-4),
        "backbone.1.weight": (0.02, 0.0),
        "backbone.1.bias": (0.02, 0.0),
        "head.weight": (0.02, 1e-4),
        "head.bias": (0.04, 0.0),
    }


def test_adamw_backbone_rate_frozen_parameters_and_batch_scaling(tiny_detector):
    model = tiny_detector()
    model.backbone[1].requires_grad_(False)
    config = OptimizerConfig(
        kind="adamw", lr=1e-3, lr_for_batch=16, weight_decay=0.05, bias_lr_factor=1.0, backbone_lr_factor=0.1
    )
    optimizer = build_optimizer(model, config, batch_images=8)
    assert isinstance(optimizer, torch.optim.AdamW)
    found = rates(model, optimizer)
    assert set(found) == {"backbone.0.weight", "head.weight", "head.bias"}
    assert found["backbone.0.weight"] == (pytest.approx(5e-5), 0.05)
    assert found["head.weight"] == (pytest.approx(5e-4), 0.05)
    assert found["head.bias"] == (pytest.approx(5e-4), 0.0)
    assert build_optimizer(model, OptimizerConfig(), 8).param_groups[0]["lr"] == 0.02  # not scaled unless asked


def test_a_network_that_is_all_frozen_is_refused(tiny_detector):
    with pytest.raises(ValueError, match="no parameter that trains"):
        build_optimizer(tiny_detector().requires_grad_(False), OptimizerConfig(), 16)


def test_warmup_and_steps_of_1x():
    schedule = Schedule.of(ScheduleConfig(iterations=90_000, steps=(60_000, 80_000)), epoch_iterations=7_329)
    expected = {
        0: 1 / 3,
        250: 2 / 3,
        499: 1 / 3 * (1 / 500) + 499 / 500,
        500: 1.0,
        59_999: 1.0,
        60_000: 0.1,
        79_999: 0.1,
        80_000: 0.01,
        89_999: 0.01,
    }
    for iteration, factor in expected.items():
        assert schedule.factor(iteration) == pytest.approx(factor, rel=1e-12), iteration


def test_epochs_become_iterations():
    # COCO's 117,266 pictures with objects, by 16
    schedule = Schedule.of(ScheduleConfig(epochs=20, steps=(16, 19)), epoch_iterations=7_329)
    assert schedule.iterations == 146_580
    assert schedule.milestones == (117_264, 139_251)


def test_cosine():
    config = ScheduleConfig(iterations=100, decay="cosine", final_factor=0.1, warmup_iterations=10, warmup_factor=0.0)
    schedule = Schedule.of(config, epoch_iterations=1)
    assert schedule.factor(0) == 0.0
    assert schedule.factor(5) == pytest.approx(0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(0.05 * math.pi))))
    assert schedule.factor(50) == pytest.approx(0.55)
    assert schedule.factor(100) == pytest.approx(0.1)
    assert schedule.factor(200) == pytest.approx(0.1)


def test_rates_follow_the_factor_in_every_group(tiny_detector):
    optimizer = build_optimizer(tiny_detector(), OptimizerConfig(), 16)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.1)  # of the full rate, not of the last one
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.002, 0.004])


def test_clipping_by_hand():
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))])
    model[0].grad, model[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])  # norm 7
    assert clip_gradients(model, 0.0).item() == pytest.approx(7.0)
    assert model[0].grad.tolist() == [2.0, 3.0]
    assert clip_gradients(model, 3.5).item() == pytest.approx(7.0)
    assert model[0].grad.tolist() == pytest.approx([1.0, 1.5], rel=1e-5)
    assert model[1].grad.tolist() == pytest.approx([3.0], rel=1e-5)
    assert clip_gradients(model, 10.0).item() == pytest.approx(3.5, rel=1e-5)  # short ones stay


def test_average_by_hand():
    model = nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = Ema(model, decay=0.25)
    with torch.no_grad():
        model.weight.fill_(12.0)
        model.running_mean.fill_(11.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model)  # first update: decay (1 + 1) / (10 + 1) = 2 / 11
    assert ema.module.weight.item() == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    assert ema.module.running_mean.item() == pytest.approx(9.0)
    assert ema.module.num_batches_tracked.item() == 7
    second = ema.module.weight.item()
    ema.update(model)  # 3 / 12 = 0.25: at the limit from here on
    assert ema.module.weight.item() == pytest.approx(0.25 * second + 0.75 * 12)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(0.0625 * second + 0.9375 * 12)
    assert not ema.module.training and not ema.module.weight.requires_grad


def test_average_goes_on_from_its_state(tiny_detector):
    torch.manual_seed(0)
    model = tiny_detector()
    ema = Ema(model, 0.9)
    ema.update(tiny_detector())
    again = Ema(model, 0.9)
    again.load_state_dict(ema.state_dict())
    now = tiny_detector()
    ema.update(now)
    again.update(now)
    assert again.updates == 2
    for name, tensor in ema.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_average_needs_a_share(decay, tiny_detector):
    with pytest.raises(ValueError, match=r"ema.decay is .*; it must lie between 0 and 1"):
        Ema(tiny_detector(), decay)
