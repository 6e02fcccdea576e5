"""The network as a whole, small: what it does with odd input, and the wiring of the paper's parts."""

from dataclasses import replace

import pytest
import torch

from dsg.model import build
from dsg.model.network.batch import stack_images
from dsg.model.network.losses import RoISamples, crop_masks, rows_with_mask
from dsg.model.network.types import Targets

SMALL = {"channels": 16, "box_head_width": 32, "proposals": 30, "rpn_candidates": 60, "proposals_train": 40,
         "rpn_candidates_train": 60, "roi_samples": 16, "max_detections": 10}  # fmt: skip
ALL_FIVE = {"mrpn": True, "fuse_mask": True, "sgra_box": True, "fuse_box": True, "sgra_mask": True}


def small(name="dsg_lite0_fpn", **overrides):
    torch.manual_seed(0)
    return build(name, num_classes=3, **{**SMALL, **overrides})


def confident(model):
    """Random classifier weights large enough that detections pass a floor and differ."""
    torch.nn.init.normal_(model.box_head.classifier.weight, std=1.0)
    torch.nn.init.normal_(model.mask_head.predictor.weight, std=0.3)
    torch.nn.init.normal_(model.rpn_head.objectness.weight, std=0.3)
    if model.mpn is not None:
        torch.nn.init.normal_(model.mpn.predictor.weight, std=0.3)
    return model.eval()


def target(height=64, width=96, **extra):
    boxes = torch.tensor([[8.0, 8, 40, 40], [30, 20, 80, 60]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 8:40, 8:40] = 1
    masks[1, 20:60, 30:80] = 1
    return {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks, **extra}


def no_objects(height=64, width=96):
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, height, width, dtype=torch.uint8),
    }


def gradients_or_zeros(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    "overrides", [{}, {"mrpn": False, "fuse_mask": False, "sgra_box": False, "fuse_box": False}, ALL_FIVE]
)
def test_losses_are_finite_and_reach_every_parameter(overrides):
    model = small(**overrides)
    losses = model([torch.rand(3, 64, 96), torch.rand(3, 50, 70)], [target(), no_objects(50, 70)])
    assert all(torch.isfinite(value) for value in losses.values())
    assert ("loss_proposal_mask" in losses) == overrides.get("mrpn", True)
    sum(losses.values()).backward()
    assert gradients_or_zeros(model) == []


@pytest.mark.parametrize("case", ["no ground truth", "boxes only", "all proposals invalid", "one RoI"])
def test_training_steps_with_little_to_learn_from(case):
    model = small(**({"roi_samples": 1} if case == "one RoI" else {}))
    truth = {
        "no ground truth": no_objects(),
        "boxes only": target(has_mask=torch.tensor([False, False])),
        "all proposals invalid": no_objects(),
        "one RoI": target(),
    }[case]
    if case == "all proposals invalid":
        model.selector.min_size = 1e9
    losses = model([torch.rand(3, 64, 96)], [truth])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert gradients_or_zeros(model) == []
    if case in ("no ground truth", "boxes only"):
        assert float(losses["loss_mask"].detach()) == float(losses["loss_proposal_mask"].detach()) == 0
    if case == "boxes only":
        assert float(losses["loss_box_reg"].detach()) > 0 and float(losses["loss_rpn_box_reg"].detach()) > 0


def test_crowd_regions_take_negatives_out_of_both_samplers():
    model = small()
    seen = []
    for part in (model.rpn_loss, model.roi_sampler):
        inner = part.sampler
        part.sampler = lambda role, inner=inner: seen.append(role.clone()) or inner(role)
    everywhere = {**no_objects(), "ignore_boxes": torch.tensor([[-400.0, -400, 500, 500]])}
    losses = model([torch.rand(3, 64, 96)], [everywhere])
    assert all((role == -1).all() for role in seen) and len(seen) == 2
    assert float(losses["loss_objectness"].detach()) == 0 and float(losses["loss_classifier"].detach()) == 0


def test_pictures_and_targets_that_do_not_fit_are_named():
    model = small()
    picture = torch.rand(3, 64, 96)
    with pytest.raises(ValueError, match="targets are needed"):
        model([picture])
    with pytest.raises(ValueError, match=r"picture 1 must be \[3, H, W\]"):
        model([picture, torch.rand(1, 64, 96)], [target(), target()])
    with pytest.raises(TypeError, match="picture 0 must be a float tensor"):
        model([torch.zeros(3, 8, 8, dtype=torch.uint8)], [target()])
    with pytest.raises(ValueError, match=r"target 0: labels must be in 1\.\.3"):
        model([picture], [{**target(), "labels": torch.tensor([0, 3])}])
    with pytest.raises(ValueError, match=r"target 0: masks must be \[2, 64, 96\]"):
        model([picture], [{**target(), "masks": torch.zeros(2, 8, 8)}])
    with pytest.raises(ValueError, match="target 0: boxes must be finite"):
        model([picture], [{**target(), "boxes": torch.tensor([[8.0, 8, 40, 40], [30, 20, 30, 60]])}])
    with pytest.raises(TypeError, match="target 0: labels must be a tensor, got list"):
        model([picture], [{**target(), "labels": [1, 3]}])
    with pytest.raises(ValueError, match="target 0 lacks masks"):
        model([picture], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}])


def test_overrides_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="unknown preset 'dsg_r49_fpn'"):
        build("dsg_r49_fpn")
    with pytest.raises(ValueError, match="unknown override fuse_bax"):
        build("dsg_lite0_fpn", fuse_bax=True)
    with pytest.raises(ValueError, match="sgra_box need mrpn=True"):
        build("mask_rcnn_lite0_fpn", sgra_box=True)
    with pytest.raises(ValueError, match="fuse_kernel must be 3 or 1"):
        build("dsg_lite0_fpn", fuse_kernel=5)


@torch.no_grad()
def test_no_proposals_gives_no_detections():
    model = confident(small())
    model.selector.min_size = 1e9
    for found in model([torch.rand(3, 64, 96), torch.rand(3, 33, 40)]):
        assert len(found) == 0 and found.mask_probs.shape == (0, 28, 28)


@torch.no_grad()
def test_levels_with_fewer_anchors_than_candidates_are_padded():
    model = confident(small(rpn_candidates=100_000))
    levels = model.backbone(torch.rand(1, 3, 64, 64))
    anchors = model.anchors(levels, (64, 64), torch.float32)
    proposals = model.selector(*model.rpn_head(levels), anchors, torch.tensor([[64, 64]]))
    assert proposals.boxes.shape == (1, 30, 4)
    assert proposals.valid.all() and (proposals.scores.diff() <= 0).all()


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_among_others_of_its_padded_size():
    model = confident(small()).double()
    pictures = [torch.rand(3, 64, 96, dtype=torch.float64), torch.rand(3, 50, 90, dtype=torch.float64)]
    together = model(pictures)
    for picture, among in zip(pictures, together, strict=True):
        (alone,) = model([picture])
        assert len(alone) == len(among) > 0
        assert torch.equal(alone.labels, among.labels)
        assert torch.allclose(alone.boxes, among.boxes, atol=1e-9)
        assert torch.allclose(alone.mask_probs, among.mask_probs, atol=1e-9)
        height, width = picture.shape[-2:]
        assert (alone.boxes[:, 2] <= width).all() and (alone.boxes[:, 3] <= height).all()


@torch.no_grad()
def test_mask_features_are_those_of_the_detections_own_boxes():
    """What the mask head is given, against the mask proposal network run by hand on the boxes that came out."""
    model = confident(small())
    given = []
    model.mask_head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    picture = torch.rand(3, 64, 96)
    (found,) = model([picture])
    levels = model._pyramid(picture[None], torch.tensor([[64, 96]]))
    rois = torch.cat([torch.zeros(len(found), 1), found.boxes], dim=1)
    pooled = model.mask_features(levels[:-1], rois)
    _, hidden = model.mpn(pooled)
    assert len(found) > 3
    torch.testing.assert_close(given[0], model.fuse_mask(pooled, hidden))


@torch.no_grad()
def test_masks_are_made_of_the_rows_that_are_returned_alone():
    model = confident(small())
    model.box_head.classifier.weight *= 0.3  # no score of 1
    pictures = [torch.rand(3, 64, 96), torch.rand(3, 50, 70), torch.rand(3, 64, 64)]
    batch, sizes = stack_images(pictures)
    padded = model.infer(batch, sizes)
    ran = []
    model.mask_head.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    for threshold in (0.0, float(padded.scores[padded.valid].median()), 1.0):
        found = model(pictures, score_threshold=threshold)
        assert ran.pop() == sum(map(len, found))
        for number, one in enumerate(found):
            rows = padded.valid[number] & (padded.scores[number] >= threshold)
            assert one.image_size == tuple(sizes[number].tolist()) and len(one) == int(rows.sum())
            for name in ("boxes", "scores", "labels", "mask_probs"):
                torch.testing.assert_close(getattr(one, name), getattr(padded, name)[number][rows])
    assert len(found[0]) == 0 and found[0].mask_probs.shape == (0, 28, 28)


@torch.no_grad()
def test_guidance_goes_where_its_switch_says():
    picture = torch.rand(3, 64, 96)
    for switch, part in (("sgra_box", "box_features"), ("sgra_mask", "mask_features")):
        for on in (True, False):
            model = confident(small(**{**ALL_FIVE, switch: on}))
            module, given = getattr(model, part), []
            module.register_forward_pre_hook(
                lambda _, args, given=given: given.append(args[2] if len(args) > 2 else None)
            )
            model([picture])
            guided = [prob for prob in given if prob is not None]
            assert bool(guided) == on
            assert all(prob.shape[1:] == (28, 28) and prob.min() >= 0 and prob.max() <= 1 for prob in guided)


def test_detached_guidance_keeps_the_box_loss_from_the_mask_proposal_network():
    for detached in (False, True):
        model = small(detach_guidance=detached, fuse_box=False, fuse_mask=False)
        torch.nn.init.normal_(model.mpn.predictor.weight, std=0.3)
        losses = model([torch.rand(3, 64, 96)], [target()])
        losses["loss_classifier"].backward()
        gradient = model.mpn.predictor.weight.grad
        assert (gradient is None or not gradient.any()) == detached


@torch.no_grad()
def test_guidance_scale_of_zero_is_plain_roi_align():
    picture = torch.rand(3, 64, 96)
    guided = confident(small(fuse_box=False, fuse_mask=False))
    plain = confident(small(fuse_box=False, fuse_mask=False, sgra_box=False))
    plain.load_state_dict(guided.state_dict())
    (with_masks,), (without,) = guided([picture]), plain([picture])
    assert not torch.allclose(with_masks.scores, without.scores)
    guided.guidance_scale.zero_()
    (silenced,) = guided([picture])
    assert torch.equal(silenced.boxes, without.boxes) and torch.equal(silenced.scores, without.scores)


def test_mask_targets_by_hand():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[0, :, 4:] = 1  # the right half
    targets = Targets(
        torch.tensor([[[4.0, 0, 8, 8]]]),
        torch.tensor([[2]]),
        torch.tensor([[True]]),
        torch.tensor([[True]]),
        torch.zeros(1, 0, 4),
        [mask],
    )
    rois = torch.tensor([[0.0, 0, 0, 8, 8], [0, 4, 0, 8, 8], [0, 0, 0, 4, 8]])
    samples = RoISamples(rois, torch.zeros(3, dtype=torch.int64), torch.tensor([2, 2, 0]))
    rows = rows_with_mask(samples, targets)
    assert rows.tolist() == [0, 1]
    crops = crop_masks(targets, samples, rows, 4, aligned=True)
    # cells of 2 x 2 pixels, sampled at pixel centres
    assert crops[0, 0].tolist() == [0, 0, 1, 1]
    assert (crops[1] == 1).all()
    # without the half pixel, samples lie between pixels: the second cell's last column is half covered
    assert crop_masks(targets, samples, rows, 4, aligned=False)[0, 0].tolist() == [0, 0.25, 1, 1]


def test_mask_targets_of_pictures_of_several_sizes():
    """Each RoI is held against the masks of its own picture, in whatever order the sizes come."""
    sizes, counts = [(8, 8), (12, 6), (8, 8), (6, 10)], [2, 1, 0, 3]
    torch.manual_seed(0)
    masks = [(torch.rand(n, *size) > 0.5).to(torch.uint8) for n, size in zip(counts, sizes, strict=True)]
    boxes = torch.zeros(4, 3, 4)
    targets = Targets(
        boxes, torch.ones(4, 3).long(), boxes.sum(2) > 0, torch.ones(4, 3) > 0, torch.zeros(4, 0, 4), masks
    )
    owners = [(3, 2), (0, 1), (1, 0), (3, 0), (0, 0), (0, 1)]
    rois = torch.tensor([[float(image), 0, 0, 5, 4] for image, _ in owners])
    samples = RoISamples(rois, torch.tensor([place for _, place in owners]), torch.ones(6).long())
    crops = crop_masks(targets, samples, torch.arange(6), 3, aligned=True)
    for (image, place), roi, crop in zip(owners, rois, crops, strict=True):
        alone = replace(targets, masks=[masks[image][place : place + 1]])
        one = RoISamples(torch.cat([torch.zeros(1), roi[1:]])[None], torch.zeros(1).long(), torch.ones(1).long())
        assert torch.equal(crop, crop_masks(alone, one, torch.zeros(1).long(), 3, aligned=True)[0])


def test_one_mask_for_all_classes_is_a_mask_of_each_class_that_is_the_same():
    shared = confident(small(mask_per_class=False, max_detections=60))
    each = small(max_detections=60).eval()
    weights = shared.state_dict()
    assert weights["mask_head.predictor.weight"].shape[0] == 1
    for name in ("mask_head.predictor.weight", "mask_head.predictor.bias"):
        weights[name] = weights[name].expand(4, *weights[name].shape[1:])
    each.load_state_dict(weights)
    picture = torch.rand(3, 64, 96)
    with torch.no_grad():
        (left,), (right,) = shared([picture]), each([picture])
        padded = shared.infer(*stack_images([picture]))
    assert len(left) > 3 and len(set(left.labels.tolist())) > 1
    torch.testing.assert_close(left.mask_probs, right.mask_probs)
    torch.testing.assert_close(padded.mask_probs[0, : len(left)], left.mask_probs)
    losses = []
    for model in (shared.train(), each.train()):
        torch.manual_seed(1)
        losses.append(model([picture], [target()]))
        sum(losses[-1].values()).backward()
        assert gradients_or_zeros(model) == []
    assert losses[0]["loss_mask"].item() == pytest.approx(losses[1]["loss_mask"].item(), rel=1e-5)


def test_half_precision_keeps_boxes_and_scores_in_float32():
    model = confident(small())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 64, 96)])
    assert found.boxes.dtype == found.scores.dtype == found.mask_probs.dtype == torch.float32
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 64, 96)], [target()])
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


def test_an_own_backbone():
    class Strided(torch.nn.Module):
        out_channels = (8, 8, 8, 8)
        pixel_mean = (0.5, 0.4, 0.3)

        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, images):
            finest = self.stem(images)
            return [finest, *(torch.nn.functional.avg_pool2d(finest, 2**k) for k in (1, 2, 3))]

    model = build("mask_rcnn_lite0_fpn", num_classes=3, backbone=Strided(), **SMALL)
    assert model.config.pixel_mean == (0.5, 0.4, 0.3)  # its own, not those of the preset it takes the place of
    assert model.pixel_mean.tolist() == [0.5, 0.4, 0.3]
    assert model.config.pixel_std == (0.229, 0.224, 0.225)  # it says none: ImageNet's
    sum(model([torch.rand(3, 64, 96)], [target()]).values()).backward()
    assert gradients_or_zeros(model) == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_the_pictures_that_they_are(dtype):
    model = confident(small()).to(dtype)
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (50, 70))]
    as_bytes, as_floats = model(pictures), model([picture.to(dtype) / 255 for picture in pictures])
    for one, other in zip(as_bytes, as_floats, strict=True):
        assert len(one) > 0
        for name in ("boxes", "scores", "labels", "mask_probs"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_anchors_are_made_once_for_each_size_of_batch():
    generator = small().anchors
    levels = [torch.zeros(1, 8, side, side) for side in (16, 8, 4, 2, 1)]
    with torch.inference_mode():
        first = generator(levels, (64, 64), torch.float32)
    again = generator(levels, (64, 64), torch.float16)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert not first[0].is_inference()
    wide = generator(levels, (64, 64), torch.float64)
    assert wide[0].dtype == torch.float64
    torch.testing.assert_close(wide[0].float(), first[0])
    for side in range(1, 40):
        generator([torch.zeros(1, 8, side, side) for _ in range(5)], (4 * side, 4 * side), torch.float32)
    assert len(generator._known) <= 16
