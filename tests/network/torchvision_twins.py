"""Torchvision's Mask R-CNN and ours with the same random weights, for tests that hold one against the other."""

from pathlib import Path

import torch
import torchvision
from torch import nn

from dsg.model.network.checkpoint import load_checkpoint
from dsg.model.network.import_torchvision import import_torchvision


def torchvision_mask_rcnn(seed: int, short_side: int, long_side: int, second=False, **options) -> nn.Module:
    """Random weights that give confident, varied detections; norms in eval mode with statistics of their own.

    Args:
        second: torchvision's second recipe.
    """
    torch.manual_seed(seed)
    detection = torchvision.models.detection
    make = detection.maskrcnn_resnet50_fpn_v2 if second else detection.maskrcnn_resnet50_fpn
    model = make(weights=None, weights_backbone=None, min_size=short_side, max_size=long_side, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.05)
    nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.01)
    # batch norms in the head make its features small
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=8.0 if second else 0.5)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    return model.eval()


def our_twin(model: nn.Module, folder: Path, preset: str = "mask_rcnn_r50_fpn"):
    """The same network of ours, by way of a file and `import_torchvision`."""
    torch.save(model.state_dict(), folder / "twin.pth")
    import_torchvision(folder / "twin.pth", preset, folder / "twin.safetensors")
    return load_checkpoint(folder / "twin.safetensors")
