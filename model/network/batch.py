"""Pictures and ground truth of many sizes, checked and put into one batch.

B images, G and I the most ground-truth and ignore boxes of an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsg.model.network.sizes import padded_size
from dsg.model.network.types import Targets
from dsg.ops._load import loaded_kernels


def stack_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures into one tensor, zeros right and below.

    Args:
        images: Tensor[3, H, W] each, RGB: float in 0..1, or all of them uint8 in 0..255.

    Returns:
        Tensor[B, 3, H, W] with sides that are multiples of 32, and int64 Tensor[B, 2]: (height, width) of each.

    Raises:
        TypeError: no tensors, or neither all floating nor all uint8.
        ValueError: no picture, not [3, H, W], or empty.
    """
    if len(images) == 0:
        raise ValueError("the network needs at least one picture, got none")
    are_bytes = all(isinstance(image, Tensor) and image.dtype == torch.uint8 for image in images)
    for number, image in enumerate(images):
        if not are_bytes and (not isinstance(image, Tensor) or not image.is_floating_point()):
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"picture {number} must be a float tensor with RGB in 0..1, got {kind}")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"picture {number} must be [3, H, W] with H, W > 0, got {list(image.shape)}")
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = padded_size(*sizes.amax(dim=0).tolist())
    batch = images[0].new_zeros((len(images), 3, height, width))
    for image, place in zip(images, batch, strict=True):
        place[:, : image.shape[1], : image.shape[2]].copy_(image)
    if batch.is_cuda:
        sizes = sizes.pin_memory()  # else the host would wait for all that the GPU has to do before
    return batch, sizes.to(batch.device, non_blocking=True)


def normalise(batch: Tensor, sizes: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch - mean) / std inside each picture, zero in the padding.

    Args:
        batch: Tensor[B, 3, H, W], RGB in 0..1, or uint8 in 0..255; sizes: int64 [B, 2]; mean, std: Tensor[3].
        dtype: of the result where `batch` is uint8; else it has that of `batch`.

    Returns:
        Tensor[B, 3, H, W].
    """
    if batch.dtype == torch.uint8:
        if batch.is_cuda and dtype != torch.float64 and "cuda" in loaded_kernels():
            pixels = torch.empty(batch.shape, dtype=dtype, device=batch.device, memory_format=torch.channels_last)
            torch.ops.dsg.normalise_pixels(batch, sizes, mean.float(), std.float(), pixels)
            return pixels
        wide = torch.promote_types(dtype, torch.float32)
        return normalise(batch.to(wide) / 255, sizes, mean.to(wide), std.to(wide), wide).to(dtype)
    height, width = batch.shape[-2:]
    rows = torch.arange(height, device=batch.device)[:, None] < sizes[:, 0, None, None, None]  # [B, 1, H, 1]
    columns = torch.arange(width, device=batch.device) < sizes[:, 1, None, None, None]  # [B, 1, 1, W]
    return ((batch - mean[:, None, None]) / std[:, None, None]).where(rows & columns, torch.zeros_like(batch))


def stack_targets(targets: Sequence[dict[str, Any]], images: Sequence[Tensor], num_classes: int) -> Targets:
    """Ground truth of a batch, padded, on the device and in the dtype of the pictures.

    Args:
        targets: dicts with `boxes` float [n, 4] xyxy pixels, `labels` int64 [n] in 1..num_classes, `masks` uint8 or
            bool [n, H, W]; optional `has_mask` bool [n] (absent: all have one), `ignore_boxes` float [c, 4], and
            `semantic` uint8 or int64 [H, W]: classes of the pixels, 255 unknown (used where all pictures have it).
        images: the pictures they belong to.

    Raises:
        ValueError: a missing key, a shape or a label that does not fit, naming the picture.
    """
    if len(targets) != len(images):
        raise ValueError(f"got {len(images)} pictures and {len(targets)} targets")
    for number, (target, image) in enumerate(zip(targets, images, strict=True)):
        _check_target(number, target, image, num_classes)
    device, dtype = images[0].device, images[0].dtype
    most = max(len(target["boxes"]) for target in targets)
    crowds = [target.get("ignore_boxes", target["boxes"].new_zeros((0, 4))) for target in targets]
    boxes = torch.zeros((len(targets), most, 4), device=device, dtype=dtype)
    labels = torch.zeros((len(targets), most), device=device, dtype=torch.int64)
    valid = torch.zeros((len(targets), most), device=device, dtype=torch.bool)
    has_mask = torch.zeros_like(valid)
    ignore = torch.zeros((len(targets), max(len(crowd) for crowd in crowds), 4), device=device, dtype=dtype)
    for number, (target, crowd) in enumerate(zip(targets, crowds, strict=True)):
        count = len(target["boxes"])
        boxes[number, :count] = target["boxes"].to(boxes)
        labels[number, :count] = target["labels"].to(labels)
        valid[number, :count] = True
        has_mask[number, :count] = target["has_mask"].to(has_mask) if "has_mask" in target else True
        ignore[number, : len(crowd)] = crowd.to(ignore)
    masks = [target["masks"].to(device) for target in targets]
    maps = [target["semantic"].to(device) for target in targets if "semantic" in target]
    return Targets(boxes, labels, valid, has_mask, ignore, masks, maps if len(maps) == len(targets) else None)


def _check_target(number: int, target: dict[str, Any], image: Tensor, num_classes: int) -> None:
    where = f"target {number}"
    missing = [key for key in ("boxes", "labels", "masks") if key not in target]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
    for name, value in (("boxes", boxes), ("labels", labels), ("masks", masks)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(value).__name__}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}: boxes must be [n, 4], got {list(boxes.shape)}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"{where}: labels must be [{len(boxes)}] as there are boxes, got {list(labels.shape)}")
    if tuple(masks.shape) != (len(boxes), *image.shape[-2:]):
        raise ValueError(f"{where}: masks must be {[len(boxes), *image.shape[-2:]]}, got {list(masks.shape)}")
    if "semantic" in target and tuple(target["semantic"].shape) != tuple(image.shape[-2:]):
        found = list(target["semantic"].shape)
        raise ValueError(f"{where}: semantic must be {list(image.shape[-2:])} as the picture is, got {found}")
    # Looking at values would wait for the device; the loader's tensors are still on the CPU here.
    if labels.device.type == "cpu" and len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise ValueError(f"{where}: labels must be in 1..{num_classes}, got {int(labels.min())}..{int(labels.max())}")
    if boxes.device.type == "cpu" and not bool(boxes.isfinite().all() & (boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError(f"{where}: boxes must be finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
