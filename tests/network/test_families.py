"""Every family of networks: training steps with little to learn from, prediction, and what its switches do."""

import pytest
import torch
from family_cases import CASES, FAMILIES, confident, family, losses_of, picture_and_target, without_gradient

from dsg.model.network.batch import stack_images


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_gives_every_head_a_gradient_or_a_zero(name, case):
    model = family(name, **({"roi_samples": 1} if case == "one RoI" else {}))
    losses = losses_of(model, case)
    assert all(value.shape == () and torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if case in ("no ground truth", "boxes only", "crowd only"):
        masks = [float(value.detach()) for key, value in losses.items() if "mask" in key]
        assert masks and set(masks) == {0.0}
    # batch norms measured nothing where there was no RoI, and stay usable
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_detections_are_those_of_infer(name):
    model = confident(family(name))
    pictures = [picture_and_target()[0], torch.rand(3, 50, 70)]
    batch, sizes = stack_images(pictures)
    padded = model.infer(batch, sizes)
    assert padded.boxes.shape == (2, 10, 4) and padded.mask_probs.shape == (2, 10, 28, 28)
    assert (padded.scores.diff(dim=1) <= 0).all() and not padded.scores[~padded.valid].any()
    threshold = float(padded.scores[padded.valid].median())
    for floor in (0.0, threshold):
        for number, found in enumerate(model(pictures, score_threshold=floor)):
            rows = padded.valid[number] & (padded.scores[number] >= floor)
            assert len(found) == int(rows.sum()) > 0
            for field in ("boxes", "scores", "labels", "mask_probs"):
                torch.testing.assert_close(getattr(found, field), getattr(padded, field)[number][rows])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_no_proposals_gives_no_detections(name):
    model = confident(family(name))
    model.selector.min_size = 1e9
    for found in model([torch.rand(3, 64, 96), torch.rand(3, 33, 40)]):
        assert len(found) == 0 and found.mask_probs.shape == (0, 28, 28)


@pytest.mark.parametrize("name", ["dsg", "cascade_dsg", "htc_dsg", "dsc"])
def test_guidance_that_is_not_detached_teaches_every_guide(name):
    """Box losses alone: without fusion they reach the mask heads through the guidance, or not at all."""
    for detached in (False, True):
        model = family(name, detach_guidance=detached, fuse_box=False, fuse_mask=False)
        confident(model).train()
        losses = losses_of(model, "plain")
        sum(value for key, value in losses.items() if "classifier" in key).backward()
        guides = [model.mpn, *([stage.mask_head for stage in model.stages[:-1]] if name != "dsg" else [])]
        for guide in guides:
            gradient = guide.convs[0].weight.grad
            assert (gradient is None or not gradient.any()) == detached


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_keeps_boxes_scores_and_losses_in_float32(name):
    model = family(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, "plain")
        assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
        sum(losses.values()).backward()
        with torch.no_grad():
            (found,) = confident(model)([picture_and_target()[0]])
    assert len(found) and found.boxes.dtype == found.scores.dtype == found.mask_probs.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu(name):
    """A step in bfloat16, and the detections of the CPU in float64."""
    model = family(name).cuda()
    picture, target = picture_and_target()
    target = {key: value.cuda() for key, value in target.items()}
    with torch.autocast("cuda", torch.bfloat16):
        losses = model([picture.cuda()], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values()) and without_gradient(model) == []
    confident(model).double()
    with torch.no_grad():
        (found,) = model([picture.cuda().double()])
        (wanted,) = model.cpu()([picture.double()])
    assert torch.equal(found.labels.cpu(), wanted.labels) and len(wanted)
    for field in ("boxes", "scores", "mask_probs"):
        torch.testing.assert_close(getattr(found, field).cpu(), getattr(wanted, field), rtol=1e-8, atol=1e-8)


def test_a_cascade_learns_one_picture():
    """Losses of a cascade fall when it sees the same picture again and again."""
    for name in ("cascade_mask_rcnn", "htc_dsg", "dsc"):
        model = family(name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        torch.manual_seed(1)
        picture, target = picture_and_target()
        totals = []
        for _ in range(25):
            total = sum(model([picture], [target]).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(float(total.detach()))
        assert sum(totals[-5:]) < 0.8 * sum(totals[:5]), name
