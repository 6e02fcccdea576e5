"""Every family of networks, small, and the odd training steps that each must survive."""

import torch

from dsg.model import build

SMALL = {"channels": 16, "box_head_width": 32, "proposals": 30, "rpn_candidates": 60, "proposals_train": 40,
         "rpn_candidates_train": 60, "roi_samples": 16, "max_detections": 10}  # fmt: skip
FAMILIES = {
    "mask_rcnn": ("mask_rcnn_lite0_fpn", {}),
    "dsg": ("dsg_lite0_fpn", {}),
    "mask scoring": ("mask_rcnn_lite0_fpn", {"mask_iou": True}),
    "mask scoring dsg": ("dsg_lite0_fpn", {"mask_iou": True}),
    "panet": ("mask_rcnn_lite0_fpn", {"panet": True}),
    "panet dsg": ("dsg_lite0_fpn", {"panet": True, "mask_iou": True}),
    "v2": ("mask_rcnn_lite0_fpn", {"normalised_heads": True}),
    "cascade_mask_rcnn": ("cascade_mask_rcnn_lite0_fpn", {}),
    "one mask stage": ("cascade_mask_rcnn_lite0_fpn", {"mask_stages": 1, "average_probabilities": True}),
    "cascade_dsg": ("cascade_dsg_lite0_fpn", {}),
    "cascade_dsg, guidance alone": ("cascade_dsg_lite0_fpn", {"fuse_box": False, "fuse_mask": False}),
    "htc": ("htc_lite0_fpn", {}),
    "htc without semantic": ("htc_lite0_fpn", {"semantic": "off"}),
    "htc_dsg": ("htc_dsg_lite0_fpn", {}),
    "dsc": ("dsc_lite0_fpn", {}),
}
CASES = ("plain", "no ground truth", "boxes only", "no positives", "one RoI", "all proposals invalid", "crowd only")


class Strided(torch.nn.Module):
    """The quickest backbone that gives four levels."""

    out_channels = (8, 8, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, images):
        finest = self.stem(images)
        return [finest, *(torch.nn.functional.avg_pool2d(finest, 2**k) for k in (1, 2, 3))]


def family(name, num_classes=3, **overrides):
    """A network of that family on a quick backbone, with random weights, in training mode."""
    torch.manual_seed(0)
    preset, own = FAMILIES[name]
    return build(preset, num_classes, backbone=Strided(), **{**SMALL, **own, **overrides})


def picture_and_target(height=64, width=96, count=2):
    """Noise, and up to two overlapping rectangles."""
    boxes = torch.tensor([[8.0, 8, 40, 40], [30, 20, 80, 60]])[:count]
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return torch.rand(3, height, width), {"boxes": boxes, "labels": torch.tensor([1, 3])[:count], "masks": masks}


def losses_of(model, case, through=None):
    """Losses of one step of that case, two pictures a batch; `through` is the network's distributed wrapper."""
    first, target = picture_and_target()
    second, other = picture_and_target(50, 70, count=1 if case == "plain" else 0)
    if case in ("no ground truth", "all proposals invalid", "crowd only"):
        target = picture_and_target(count=0)[1]
    if case == "boxes only":
        target["has_mask"] = torch.tensor([False, False])
    if case == "crowd only":
        target["ignore_boxes"] = torch.tensor([[-400.0, -400, 500, 500]])
    if case == "no positives":
        # no RoI reaches this overlap, ground truth itself included
        samplers = model.roi_samplers if hasattr(model, "roi_samplers") else [model.roi_sampler]
        for sampler in samplers:
            sampler.positive_iou = 2.0
    usual = model.selector.min_size
    if case == "all proposals invalid":
        model.selector.min_size = 1e9
    losses = (through or model)([first, second], [target, other])
    model.selector.min_size = usual
    return losses


def without_gradient(model):
    """Parameters that learn, and that a backward pass has left without a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def confident(model):
    """Random weights large enough that detections pass a floor and differ; in eval mode."""
    for name, parameter in model.named_parameters():
        if name.endswith(("classifier.weight", "objectness.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("predictor.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("regressor.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()
