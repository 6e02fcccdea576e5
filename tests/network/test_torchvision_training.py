"""Ten steps of training beside torchvision: same weights, pictures, anchors, RoIs; same losses and gradients."""

import torch
from torch.nn import functional
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision_twins import our_twin, torchvision_mask_rcnn

from dsg.model.network.matching import BalancedSampler

STEPS = 10
ROIS, ANCHORS = 16, 32
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


def scene(seed: int, height: int, width: int, count: int):
    """A float64 picture of coloured rectangles and discs, and its target."""
    generator = torch.Generator().manual_seed(seed)
    picture = (
        0.3 * functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (height, width), mode="bilinear")[0]
    )
    boxes, masks = [], []
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    for number in range(count):
        cy, cx = (torch.rand(2, generator=generator) * torch.tensor([height - 24, width - 24]) + 12).tolist()
        ry, rx = (torch.rand(2, generator=generator) * 14 + 8).tolist()
        inside = (
            ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
            if number % 2
            else ((y - cy).abs() < ry) & ((x - cx).abs() < rx)
        )
        picture[:, inside] = torch.rand(3, 1, generator=generator)
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(inside)
    labels = torch.randint(1, 91, (count,), generator=generator)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float64),
        "labels": labels,
        "masks": torch.stack(masks).to(torch.uint8),
    }
    return picture.double(), target


def first_rows_sampler(self, matched_idxs):
    """Torchvision's sampler with the first rows in place of random ones."""
    positives, negatives = [], []
    for role in matched_idxs:
        positive = torch.where(role >= 1)[0][: int(self.batch_size_per_image * self.positive_fraction)]
        negative = torch.where(role == 0)[0][: self.batch_size_per_image - len(positive)]
        for rows, masks in ((positive, positives), (negative, negatives)):
            masks.append(torch.zeros_like(role, dtype=torch.uint8).index_fill(0, rows, 1))
    return positives, negatives


def in_order(shape, device):
    return torch.arange(shape[-1], 0.0, -1, device=device).expand(shape)


def test_losses_and_gradients_of_ten_steps_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_utils.BalancedPositiveNegativeSampler, "__call__", first_rows_sampler)
    theirs = torchvision_mask_rcnn(
        3,
        short_side=64,
        long_side=128,
        rpn_pre_nms_top_n_train=120,
        rpn_post_nms_top_n_train=60,
        rpn_batch_size_per_image=ANCHORS,
        box_batch_size_per_image=ROIS,
    )
    ours, _ = our_twin(theirs, tmp_path)
    ours.selector.candidates, ours.selector.proposals = (120, 120), (60, 60)
    ours.rpn_loss.sampler = BalancedSampler(ANCHORS, 0.5, draw=in_order)
    ours.roi_sampler.sampler = BalancedSampler(ROIS, 0.25, draw=in_order)
    theirs, ours = freeze_norms(theirs).double().train(), ours.double().train()
    for module in (theirs.backbone.body.conv1, theirs.backbone.body.layer1):
        module.requires_grad_(False)

    optimisers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9, weight_decay=1e-4)
        for model in (theirs, ours)
    ]
    saw_masks = False
    for step in range(STEPS):
        scenes = [scene(2 * step, 64, 96, 3), scene(2 * step + 1, 64, 64, 2)]
        pictures, targets = [s[0] for s in scenes], [s[1] for s in scenes]
        losses = []
        for model, optimiser in zip((theirs, ours), optimisers, strict=True):
            optimiser.zero_grad()
            losses.append(model(pictures, targets))
            sum(losses[-1].values()).backward()
        for name in LOSSES:
            assert_close(losses[1][name], losses[0][name], f"{name} at step {step}")
        saw_masks |= losses[0]["loss_mask"].item() > 0 and losses[0]["loss_box_reg"].item() > 0
        compare_gradients(theirs, ours, step)
        for optimiser in optimisers:
            optimiser.step()
    assert saw_masks


def compare_gradients(theirs, ours, step: int) -> None:
    pairs = {
        "stem of stage 2": (theirs.backbone.body.layer2[0].conv1, ours.backbone.body.layer2[0].conv1),
        "last stage": (theirs.backbone.body.layer4[2].conv3, ours.backbone.body.layer4[2].conv3),
        "pyramid": (theirs.backbone.fpn.inner_blocks[1][0], ours.backbone.pyramid.inner[1]),
        "rpn": (theirs.rpn.head.conv[0][0], ours.rpn_head.conv),
        "rpn deltas": (theirs.rpn.head.bbox_pred, ours.rpn_head.deltas),
        "fc": (theirs.roi_heads.box_head.fc6, ours.box_head.fc1),
        "regressor": (theirs.roi_heads.box_predictor.bbox_pred, ours.box_head.regressor),
        "mask conv": (theirs.roi_heads.mask_head[0][0], ours.mask_head.convs[0]),
        "mask logits": (theirs.roi_heads.mask_predictor.mask_fcn_logits, ours.mask_head.predictor),
    }
    for name, (their_part, our_part) in pairs.items():
        assert_close(our_part.weight.grad, their_part.weight.grad, f"gradient of {name} at step {step}")


def assert_close(found, wanted, what: str) -> None:
    """Within 1e-6 of the largest value."""
    scale = wanted.detach().abs().max()
    assert (found.detach() - wanted.detach()).abs().max() <= 1e-6 * scale, what
    assert scale > 0 or "mask" in what or "box" in what, f"{what} is zero: nothing was compared"


def freeze_norms(model):
    """Torchvision's batch norms become its frozen ones, as its own training from ImageNet weights has them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            frozen.load_state_dict({k: v for k, v in module.state_dict().items() if k != "num_batches_tracked"})
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, frozen)
    return model
