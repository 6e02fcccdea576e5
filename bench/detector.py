"""The whole way of a picture, from its array to COCO run lengths, beside torchvision's Mask R-CNN to its masks.

On a GPU all networks are ResNet-50 with the same random weights, scaled to give as many detections as may be: Mask
R-CNN imported from torchvision, and DSG that starts from it, with guidance at its full strength. On a CPU it is one of
the package's networks, beside torchvision's Mask R-CNN on the same backbone.
"""

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from dsg.bench.report import Row, measured_row
from dsg.bench.timing import Measured, measure
from dsg.model.network.detections import Detections, with_counts
from dsg.model.network.import_torchvision import import_torchvision
from dsg.model.network.pixels import picture_array
from dsg.model.network.predictor import Predictor, load

_SIZE = (800, 1333)  # (height, width): what COCO's pictures are resized to
_PHOTO = (480, 640)
_PROPOSALS = (1000, 300)
_LAYOUTS = (torch.channels_last, torch.contiguous_format)
OnCase = Callable[[str], None]


def run(device: torch.device, batches: list[int], repeats: int, on_case: OnCase = lambda case: None) -> list[Row]:
    """Pictures a second of networks on ResNet-50 and the time of one picture alone, whole and stage by stage.

    Args:
        device: CUDA; a CPU takes minutes.
        batches: numbers of pictures in a batch; of 1 the time is given.
        repeats: measurements of each, of which the median counts.
        on_case: told each case before it is measured.
    """
    rows = []
    model = _torchvision_model()
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (*_SIZE, 3), dtype=np.uint8) for _ in range(max(batches))]
    with tempfile.TemporaryDirectory() as folder:
        ours = _predictors(model, device, Path(folder))
        theirs = Torchvision(model, device, pictures[0])
        for batch in batches:
            on_case(f"torchvision, batch {batch}")
            baselines = _stages_of_torchvision(theirs, pictures[:batch], repeats)
            plain: dict[int, Measured] = {}
            for name, proposals, predictor in ours:
                case = f"{name}, {proposals} proposals, batch {batch}"
                on_case(case)
                found = _stages(predictor, pictures[:batch], repeats)
                size = f" of {_SIZE[0]}x{_SIZE[1]}"
                rows += _rows(case, size, "torchvision's Mask R-CNN", found, baselines, batch)
                each = Measured([time / batch for time in found["whole"].times], found["whole"].peak_mib)
                if proposals not in plain:
                    plain[proposals] = each
                    continue
                rows.append(measured_row(f"{case}, a picture; baseline our own Mask R-CNN", each, plain[proposals]))
    return rows


def run_on_cpu(model: str, picture: Path | None, repeats: int, on_case: OnCase = lambda case: None) -> list[Row]:
    """One picture through a network on the CPU, whole and stage by stage, beside torchvision's heads on its backbone.

    Args:
        model: a name of `dsg models`, or a checkpoint.
        picture: a file; None makes up a scene of 480x640.
        repeats, on_case: as in `run`.
    """
    device = torch.device("cpu")
    predictor = load(model, device)
    pixels = made_up_scene() if picture is None else picture_array(picture)
    count = len(predictor.detect([predictor.prepare(pixels)])[0])
    theirs = Torchvision(torchvision_on_backbone_of(predictor, count), device, pixels)
    on_case("torchvision")
    their_count = len(theirs.finish(*theirs.detect(theirs.prepare([pixels])))[0])
    baselines = _stages_of_torchvision(theirs, [pixels], repeats)
    on_case(predictor.info.name)
    found = _stages(predictor, [pixels], repeats)
    case, size = f"{predictor.info.name}, {count} detections, batch 1", f" of {pixels.shape[0]}x{pixels.shape[1]}"
    baseline = f"torchvision's Mask R-CNN on the same backbone, {their_count} detections,"
    return _rows(case, size, baseline, found, baselines, 1)


class Torchvision:
    """torchvision's Mask R-CNN in its three parts; on a GPU in half precision, as ours.

    Args:
        model: in eval mode; moved to the device, into the layout that it is quicker in.
        picture: uint8 [H, W, 3], to find that out with.
    """

    def __init__(self, model: nn.Module, device: torch.device, picture: np.ndarray) -> None:
        self.model: Any = model.to(device)
        self.device = device
        prepared = self.prepare([picture])
        times = {}
        for layout in _LAYOUTS:
            self.model.to(memory_format=layout)
            times[layout] = measure(partial(self.detect, prepared), device, 3).median
        self.model.to(memory_format=min(_LAYOUTS, key=times.__getitem__))

    @torch.inference_mode()
    def prepare(self, pictures: list[np.ndarray]) -> Any:
        """Upload, normalise, resize, batch; and the sizes the pictures had."""
        tensors = [torch.from_numpy(picture).to(self.device).permute(2, 0, 1).float() / 255 for picture in pictures]
        with self._autocast():
            return self.model.transform(tensors)[0], [picture.shape[:2] for picture in pictures]

    @torch.inference_mode()
    def detect(self, prepared: Any) -> Any:
        """Backbone, RPN and heads: boxes and probabilities of 28x28, in the frame of the batch."""
        images, sizes = prepared
        with self._autocast():
            levels = self.model.backbone(images.tensors)
            proposals, _ = self.model.rpn(images, levels)
            return self.model.roi_heads(levels, proposals, images.image_sizes)[0], images.image_sizes, sizes

    @torch.inference_mode()
    def finish(self, found: list[dict[str, Tensor]], resized: Any, sizes: Any) -> list[Tensor]:
        """Masks bool [n, 1, H, W] of each picture, at its size, on the host."""
        with self._autocast():
            results = self.model.transform.postprocess([dict(one) for one in found], resized, sizes)
            return [(one["masks"] >= 0.5).cpu() for one in results]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")


def made_up_scene() -> np.ndarray:
    """Ellipses of many sizes and colours on a soft ground, uint8 [480, 640, 3], the same in every run."""
    chance = np.random.default_rng(0)
    rows, columns = np.mgrid[: _PHOTO[0], : _PHOTO[1]]
    scene = 90 + 60 * np.sin(rows / 97)[..., None] * np.cos(columns / 131)[..., None] * np.array([1.0, 0.8, 0.5])
    for _ in range(24):
        (y, x), (high, wide) = chance.uniform((0, 0), _PHOTO), chance.uniform(10, 90, 2)
        inside = ((rows - y) / high) ** 2 + ((columns - x) / wide) ** 2 < 1
        scene[inside] = chance.uniform(0, 255, 3)
    return (scene + chance.normal(0, 6, scene.shape)).clip(0, 255).astype(np.uint8)


def torchvision_on_backbone_of(predictor: Predictor, detections: int) -> nn.Module:
    """torchvision's Mask R-CNN on a copy of a network's backbone and pyramid, with its anchors and its resize.

    The heads are torchvision's own, on its 1,000 proposals. Their weights are random, and find up to so many detections
    everywhere.
    """
    config, how = predictor.model.config, predictor.info.resize
    torch.manual_seed(0)
    model = MaskRCNN(
        _NamedLevels(copy.deepcopy(predictor.model.backbone)),
        num_classes=config.num_classes + 1,
        min_size=how.short_side,
        max_size=how.long_side,
        image_mean=config.pixel_mean,
        image_std=config.pixel_std,
        rpn_anchor_generator=AnchorGenerator(config.anchor_sizes, (config.anchor_ratios,) * len(config.anchor_sizes)),
        box_detections_per_img=max(detections, 1),
    )
    return _finding_everywhere(model)


class _NamedLevels(nn.Module):
    """A pyramid as torchvision names its levels."""

    def __init__(self, levels: nn.Module) -> None:
        super().__init__()
        self.levels = levels
        self.out_channels = levels.out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, 3, H, W]
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), self.levels(images), strict=True))


def _torchvision_model() -> nn.Module:
    torch.manual_seed(0)
    return _finding_everywhere(torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))


def _finding_everywhere(model: nn.Module) -> nn.Module:
    """Random weights that find something everywhere; the masks fill their boxes."""
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


def _stages(predictor: Predictor, pictures: list[np.ndarray], repeats: int) -> dict[str, Measured]:
    """Times of a batch: the whole, and each stage on what the one before it gave."""

    def prepare() -> list[Any]:
        return [predictor.prepare(picture) for picture in pictures]

    def run_lengths(found: list[Detections]) -> None:
        for one in with_counts(found):
            one.rle()

    prepared = prepare()
    found = predictor.detect(prepared)
    calls: dict[str, Callable[[], object]] = {
        "whole": lambda: run_lengths(predictor.detect(prepare())),
        "prepare": prepare,
        "detect": lambda: predictor.detect(prepared),
        "run lengths": lambda: run_lengths(found),
    }
    return {stage: measure(call, predictor.device, repeats) for stage, call in calls.items()}


def _stages_of_torchvision(theirs: Torchvision, pictures: list[np.ndarray], repeats: int) -> dict[str, Measured]:
    prepared = theirs.prepare(pictures)
    found = theirs.detect(prepared)
    calls: dict[str, Callable[[], object]] = {
        "whole": lambda: theirs.finish(*theirs.detect(theirs.prepare(pictures))),
        "prepare": lambda: theirs.prepare(pictures),
        "detect": lambda: theirs.detect(prepared),
        "run lengths": lambda: theirs.finish(*found),
    }
    return {stage: measure(call, theirs.device, repeats) for stage, call in calls.items()}


def _rows(
    case: str, size: str, baseline: str, ours: dict[str, Measured], theirs: dict[str, Measured], batch: int
) -> list[Row]:
    """The whole, then its stages; each stage beside the one of torchvision's that does its work."""
    words = {
        "prepare": ("arrays to resized pictures", "upload, normalising and resize"),
        "detect": ("upload and network, to boxes in the pictures' frames", "backbone, RPN and heads"),
        "run lengths": ("masks to run lengths", "pasting, threshold and way to the host"),
    }
    whole = f"{case}{size} to run lengths; baseline {baseline} to its masks"
    rows = [measured_row(whole, ours["whole"], theirs["whole"], images=batch if batch > 1 else None)]
    for stage, (own, other) in words.items():
        text = f"{case}{size}, {stage}: {own}{', of the batch' if batch > 1 else ''}; baseline {baseline} {other}"
        rows.append(measured_row(text, ours[stage], theirs[stage]))
    return rows
