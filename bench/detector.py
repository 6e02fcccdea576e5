"""The whole way of a picture, from its array to COCO run lengths, beside torchvision's Mask R-CNN to its masks.

All networks here are ResNet-50 with the same random weights, scaled to give as many detections as may be: Mask R-CNN
imported from torchvision, and DSG that starts from it, with guidance at its full strength.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from dsg.bench.report import Row, rate_row, time_row
from dsg.bench.timing import milliseconds_of
from dsg.model.network.detections import with_counts
from dsg.model.network.import_torchvision import import_torchvision
from dsg.model.network.predictor import Predictor, load

_SIZE = (800, 1333)  # (height, width): what COCO's pictures are resized to
_PROPOSALS = (1000, 300)


def run(
    device: torch.device, batches: list[int], repeats: int, on_case: Callable[[str], None] = lambda case: None
) -> list[Row]:
    """Pictures a second, and the time of one alone.

    Args:
        device: CPU or CUDA.
        batches: numbers of pictures in a batch; of 1 the time is given.
        repeats: measurements of each, of which the median counts.
        on_case: told each case before it is measured.
    """
    rows = []
    theirs = _torchvision_model()
    with tempfile.TemporaryDirectory() as folder:
        ours = _predictors(theirs, device, Path(folder))
        theirs.to(device)
        generator = np.random.default_rng(0)
        pictures = [generator.integers(0, 256, (*_SIZE, 3), dtype=np.uint8) for _ in range(max(batches))]
        for batch in batches:
            on_case(f"torchvision, batch {batch}")
            baseline = _median(partial(_torchvision_masks, theirs, pictures[:batch], device), device, repeats)
            plain: dict[int, float] = {}
            for name, proposals, predictor in ours:
                case = f"{name}, {proposals} proposals, batch {batch}"
                on_case(case)
                found = _median(partial(_run_lengths, predictor, pictures[:batch]), device, repeats)
                case += f" of {_SIZE[0]}x{_SIZE[1]} to run lengths; baseline torchvision's Mask R-CNN to its masks"
                if batch == 1:
                    rows.append(time_row(case, found, baseline))
                else:
                    rows.append(rate_row(case, "images/s", batch * 1000 / found, batch * 1000 / baseline))
                if proposals not in plain:
                    plain[proposals] = found / batch
                    continue
                case = f"{name}, {proposals} proposals, batch {batch}, a picture; baseline our own Mask R-CNN"
                rows.append(time_row(case, found / batch, plain[proposals]))
    return rows


def _median(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    return statistics.median(milliseconds_of(call, device, repeats))


def _torchvision_model() -> nn.Module:
    """Random weights that find something everywhere; its masks fill their boxes."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for layer, std in (
        ("rpn.head.cls_logits", 0.05),
        ("roi_heads.box_predictor.cls_score", 0.5),
        ("roi_heads.box_predictor.bbox_pred", 0.02),
    ):
        nn.init.normal_(model.get_parameter(f"{layer}.weight"), std=std)
    nn.init.constant_(model.get_parameter("roi_heads.mask_predictor.mask_fcn_logits.bias"), 4.0)
    return model.eval()


def _predictors(theirs: nn.Module, device: torch.device, folder: Path) -> list[tuple[str, int, Predictor]]:
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    found = []
    for proposals in _PROPOSALS:
        for name, preset in (("Mask R-CNN", "mask_rcnn_r50_fpn"), ("DSG", "dsg_r50_fpn")):
            path = folder / f"{preset}.safetensors"
            if not path.exists():
                import_torchvision(folder / "theirs.pth", preset, path)
            predictor = load(path, device, proposals=proposals)
            if preset.startswith("dsg"):
                predictor.model.guidance_scale.fill_(1.0)
            found.append((f"{name} R-50", proposals, predictor))
    return found


def _run_lengths(predictor: Predictor, pictures: list[np.ndarray]) -> None:
    found = predictor.detect([predictor.prepare(picture) for picture in pictures])
    for one in with_counts(found):
        one.rle()


@torch.inference_mode()
def _torchvision_masks(model: nn.Module, pictures: list[np.ndarray], device: torch.device) -> None:
    """In half precision on a GPU, as ours; masks at the pictures' size, as `model.eval()` gives them."""
    tensors = [torch.from_numpy(picture).to(device).permute(2, 0, 1).float() / 255 for picture in pictures]
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        for found in model(tensors):
            (found["masks"] >= 0.5).cpu()
