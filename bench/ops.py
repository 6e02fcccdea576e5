"""`dsg.ops` against torchvision and pycocotools: RoI features of a pyramid, and masks as run lengths.

Letters: R RoIs, C channels, m side of a mask's probabilities.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign, roi_align

from dsg.bench.report import Row, measured_row
from dsg.bench.timing import compare, compare_kernels
from dsg.ops import encode_masks, multiscale_sg_roi_align

_STRIDES = (4, 8, 16, 32)
_IMAGE = (800, 1216)  # (height, width): the usual size of a training or test picture
_PHOTO = (480, 640)
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16)}


@dataclass(frozen=True)
class _Pooling:
    """RoIs as one head of a network sees them."""

    name: str
    rois: int
    channels: int
    side: int


_POOLINGS = (
    _Pooling("box head on ResNet", 1000, 256, 7),
    _Pooling("mask head on ResNet", 100, 256, 14),
    _Pooling("box head on Lite", 200, 128, 7),
)


def run(device: torch.device, repeats: int, on_case: Callable[[str], None] = lambda case: None) -> list[Row]:
    """Measure every case; ratios above 1 mean that dsg.ops is the quicker one.

    Pooling counts as the GPU's own time. The masks' cases end as text on the host, and count by the wall clock.

    Args:
        device: CPU or CUDA.
        repeats: measurements of which the median counts.
        on_case: told each case before it is measured.
    """
    rows = []
    batches = _batch_cases(device) if device.type == "cuda" else ()
    for way, cases in (
        (compare_kernels, chain(_pooling_cases(device), batches)),
        (compare, chain(_mask_cases(device), (_paste_case(device),))),
    ):
        for case, ours, theirs in cases:
            on_case(case)
            rows.append(measured_row(case, *way(ours, theirs, device, repeats)))
    return rows


_Case = tuple[str, Callable[[], object], Callable[[], object]]


def _pooling_cases(device: torch.device) -> Iterator[_Case]:
    """With and without guidance, forward and with the gradients, against torchvision's plain RoIAlign."""
    for pooling in _POOLINGS:
        for dtype in _DTYPES[device.type]:
            features = [
                torch.randn(1, pooling.channels, _IMAGE[0] // s, _IMAGE[1] // s, device=device, dtype=dtype)
                for s in _STRIDES
            ]
            boxes = _boxes(pooling.rois, _IMAGE).to(device)  # [R, 4]
            prob = torch.rand(pooling.rois, 28, 28, device=device, dtype=dtype)
            for backward in (False, True):
                levels = [level.detach().requires_grad_(backward) for level in features]
                for guide in (None, prob):
                    what = "SgRoIAlign" if guide is not None else "RoIAlign"
                    how = f"{str(dtype).removeprefix('torch.')}, forward{' and backward' if backward else ''}"
                    case = f"{what}, {pooling.name}, {pooling.rois} RoIs, {how}; baseline torchvision RoIAlign"
                    yield case, _ours(levels, boxes, guide, pooling.side), _theirs(levels, boxes, pooling.side)


def _ours(levels: list[Tensor], boxes: Tensor, prob: Tensor | None, side: int) -> Callable[[], object]:
    rois = torch.cat((boxes.new_zeros(len(boxes), 1), boxes), dim=1)  # [R, 5]
    scales = [1 / stride for stride in _STRIDES]

    def pool() -> None:
        _finish(levels, multiscale_sg_roi_align(levels, rois, prob, side, scales, aligned=False))

    return pool


def _theirs(levels: list[Tensor], boxes: Tensor, side: int) -> Callable[[], object]:
    align = MultiScaleRoIAlign([str(stride) for stride in _STRIDES], side, sampling_ratio=2)
    named = {str(stride): level for stride, level in zip(_STRIDES, levels, strict=True)}
    boxes = boxes.to(levels[0].dtype)  # torchvision wants one dtype for all

    def pool() -> None:
        _finish(levels, align(named, [boxes], [_IMAGE]))

    return pool


def _finish(levels: list[Tensor], pooled: Tensor) -> None:
    """The backward pass, where gradients are wanted."""
    if pooled.requires_grad:
        torch.autograd.grad(pooled, levels, torch.ones_like(pooled))


def _batch_cases(device: torch.device) -> Iterator[_Case]:
    """A batch as a network sees it, against torchvision's plain `roi_align` with the RoIs split by level beforehand."""
    pictures, rois, channels, side = 8, 1000, 256, 7
    boxes = torch.cat([_boxes(rois, _IMAGE) for _ in range(pictures)]).to(device)  # [R, 4]
    numbers = torch.arange(pictures, device=device).repeat_interleave(rois)[:, None].float()
    all_rois = torch.cat((numbers, boxes), dim=1)  # [R, 5]
    extent = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()  # [R]
    level_of = (4 + torch.log2(extent / 224 + 1e-6)).floor().clamp(2, 5) - 2  # [R]
    prob = torch.rand(len(all_rois), 28, 28, device=device)
    scales = [1 / stride for stride in _STRIDES]
    for dtype in _DTYPES["cuda"]:
        shapes = [(pictures, channels, _IMAGE[0] // s, _IMAGE[1] // s) for s in _STRIDES]
        plain = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        own = [level.contiguous(memory_format=torch.channels_last) for level in plain]
        split = [all_rois[level_of == number].to(dtype) for number in range(len(scales))]
        for backward in (False, True):
            theirs = [level.detach().requires_grad_(backward) for level in plain]
            ours = [level.detach().requires_grad_(backward) for level in own]

            def pool_ours(levels: list[Tensor] = ours) -> None:
                _finish(levels, multiscale_sg_roi_align(levels, all_rois, prob, side, scales))

            def pool_theirs(levels: list[Tensor] = theirs, split: list[Tensor] = split) -> None:
                for level, mine, scale in zip(levels, split, scales, strict=True):
                    _finish([level], roi_align(level, mine, side, scale, sampling_ratio=2, aligned=True))

            how = f"{str(dtype).removeprefix('torch.')}, forward{' and backward' if backward else ''}"
            case = f"SgRoIAlign, {pictures} pictures of {rois} RoIs, {channels} channels, {how}"
            yield f"{case}; baseline torchvision roi_align of RoIs split by level", pool_ours, pool_theirs


def _mask_cases(device: torch.device) -> Iterator[_Case]:
    """100 box masks of one photo to COCO run lengths, against pasting and encoding full-size masks."""
    boxes = _boxes(100, _PHOTO).to(device)
    probs = torch.rand(100, 28, 28, device=device)

    def theirs() -> None:
        pasted = paste_masks_in_image(probs[:, None], boxes, _PHOTO)[:, 0] >= 0.5  # [R, H, W]
        coco_mask.encode(pasted.permute(1, 2, 0).byte().cpu().contiguous().numpy().copy(order="F"))

    case = "encode_masks, 100 masks in a photo of 480x640; baseline torchvision paste and pycocotools encode"
    yield case, lambda: encode_masks(probs, boxes, _PHOTO), theirs


def _paste_case(device: torch.device) -> _Case:
    """100 masks of a picture of 800x1333 to run lengths, against torchvision's pasting without any encoding."""
    size = (800, 1333)
    axis = torch.linspace(-1, 1, 28)
    disc = torch.sigmoid((0.8 - (axis[:, None] ** 2 + axis**2).sqrt()) * 10)  # [28, 28]
    boxes, probs = _boxes(100, size).to(device), disc.expand(100, 28, 28).contiguous().to(device)
    case = "encode_masks, 100 masks in a picture of 800x1333; baseline torchvision's pasting alone"
    return case, lambda: encode_masks(probs, boxes, size), lambda: paste_masks_in_image(probs[:, None], boxes, size)


def _boxes(count: int, size: tuple[int, int]) -> Tensor:
    """Boxes of all sizes inside a picture, Tensor[count, 4] xyxy, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    sides = torch.exp(torch.empty(count, 2).uniform_(2.5, 6.0, generator=generator))  # 12 to 400 pixels
    sides = torch.minimum(sides, torch.tensor([width - 1.0, height - 1.0]))
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat((corner, corner + sides), dim=1)
