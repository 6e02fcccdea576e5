"""Masks predicted inside boxes, pasted into the picture or encoded as COCO RLE.

The convention is torchvision's: the m x m probabilities get a border of one zero, the box grows about its
centre by (m + 2) / m, its corners are truncated to integers, the probabilities are resized to (y2 - y1 + 1,
x2 - x1 + 1) pixels, bilinear with align_corners=False, and a pixel is set where the result is at least the
threshold.

Only the part of a box that lies in the picture is ever held, and only one box at a time is resized: whole,
where that is not many times larger than the part to be seen, and otherwise that part alone.

Letters: `N` masks, `m` side of a mask, `s = m + 2` side with its border, `H, W` size of the picture, `h, w`
size of a window (what of a box lies in the picture).
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsg.ops.cuda_masks import can_encode, encode_on_cuda
from dsg.ops.grid_paste import grid_windows
from dsg.ops.rle import counts_to_strings, window_counts
from dsg.ops.windows import Window, box_windows

# A box of at most this many times its visible pixels is resized whole, by PyTorch, and then cut; so are all
# small boxes, for which PyTorch's CPU kernel uses another arithmetic than the one that `_window_values`
# follows.
_WHOLE_BOX_FACTOR = 2
_WHOLE_BOX_PIXELS = 1 << 14
# Windows of larger boxes are computed in blocks of rows of about this many pixels, to bound the temporaries.
_BLOCK_PIXELS = 1 << 20
# Bits of several masks leave an accelerator together, in transfers of about this many bytes.
_TRANSFER_PIXELS = 1 << 26


def paste_masks(
    probs: Tensor,  # [N, m, m]
    boxes: Tensor,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float = 0.5,
    paste: str = "box",
) -> Tensor:  # [N, H, W]
    """Full-size masks: bool [N, H, W] on the device of `probs`.

    Args:
        probs: [N, m, m] in [0, 1], any float dtype; half precision is resized in float32.
        boxes: [N, 4] as (x1, y1, x2, y2) in pixels of the picture; they may reach outside it. A box with a
            coordinate that is not finite, or one that misses the picture, gives an empty mask.
        image_size: (H, W), both at least 1.
        threshold: a pixel inside a box is set where its probability is at least this; above 0.
        paste: "box" is torchvision's convention, above; "grid" samples at pixel centres, see `grid_paste`.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or another `paste`.
    """
    probs = _checked(probs, boxes, image_size)
    masks = torch.zeros((len(probs), *image_size), dtype=torch.bool, device=probs.device)
    for window, bits in _pasted_windows(probs, boxes, image_size, threshold, paste):
        masks[window.number, window.top : window.bottom, window.left : window.right] = bits
    return masks


def encode_masks(
    probs: Tensor,  # [N, m, m]
    boxes: Tensor,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float = 0.5,
    paste: str = "box",
) -> list[dict[str, Any]]:
    """COCO RLEs of the masks that `paste_masks` gives for the same arguments, without a full-size mask.

    Returns:
        N times `{"size": [H, W], "counts": str}`, byte for byte what pycocotools makes of the pasted masks; on a GPU
        with paste "grid", but for pixels whose probability is the threshold up to its last bit.
    """
    ((texts, _),) = encode_mask_batches([(probs, boxes, image_size)], threshold, paste)
    return [{"size": [int(image_size[0]), int(image_size[1])], "counts": text} for text in texts]


def encode_mask_batches(
    batches: Sequence[tuple[Tensor, Tensor, tuple[int, int]]], threshold: float = 0.5, paste: str = "box"
) -> list[tuple[list[str], list[int]]]:
    """The compressed counts of the masks of several pictures, each as `encode_masks` gives them, and their areas.

    Args:
        batches: probs [N, m, m], boxes [N, 4] and (H, W) of each picture; on one device, m the same in all. A GPU does
            all of them at once.
    """
    batches = [(_checked(probs, boxes, size), boxes.detach(), size) for probs, boxes, size in batches]
    if paste not in ("box", "grid") or not all(can_encode(*one) for one in batches):
        return [_encode_picture(*one, threshold, paste) for one in batches]
    numbers = [len(probs) for probs, _, _ in batches]
    of_masks = [size for number, (_, _, size) in zip(numbers, batches, strict=True) for _ in range(number)]
    sizes = torch.tensor(of_masks, dtype=torch.int64).reshape(-1, 2)  # [N, 2]
    texts, areas = encode_on_cuda(
        _joined([probs for probs, _, _ in batches]),
        _joined([boxes.float() for _, boxes, _ in batches]),
        sizes.pin_memory().to(batches[0][0].device, non_blocking=True),
        max(width for _, _, (_, width) in batches),
        threshold,
        paste == "grid",
    )
    ends = list(accumulate(numbers))
    parts = [slice(end - number, end) for number, end in zip(numbers, ends, strict=True)]
    return [(texts[part], areas[part]) for part in parts]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _encode_picture(
    probs: Tensor,  # [N, m, m]
    boxes: Tensor,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float,
    paste: str,
) -> tuple[list[str], list[int]]:
    nothing = window_counts(np.zeros((0, 0), dtype=np.bool_), 0, 0, image_size)
    counts = [nothing] * len(probs)
    waiting: list[tuple[Window, Tensor]] = []
    pixels = 0
    for window, bits in _pasted_windows(probs, boxes, image_size, threshold, paste):
        waiting.append((window, bits))
        pixels += bits.numel()
        if not probs.is_cuda or pixels >= _TRANSFER_PIXELS:
            _count_runs(waiting, image_size, counts)
            waiting, pixels = [], 0
    _count_runs(waiting, image_size, counts)
    return counts_to_strings(counts), [int(one[1::2].sum()) for one in counts]


def _count_runs(
    windows: list[tuple[Window, Tensor]],
    image_size: tuple[int, int],
    counts: list[NDArray[np.int64]],
) -> None:
    """Fill in the counts of some masks, whose bits come to the CPU in one transfer."""
    if not windows:
        return
    if len(windows) == 1:
        flat = windows[0][1].reshape(-1).cpu().numpy()
    else:
        flat = torch.cat([bits.reshape(-1) for _, bits in windows]).cpu().numpy()
    begin = 0
    for window, bits in windows:
        pixels = flat[begin : begin + bits.numel()].reshape(bits.shape)  # [h, w]
        counts[window.number] = window_counts(pixels, window.top, window.left, image_size)
        begin += bits.numel()


def _checked(probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The probabilities in the dtype they are resized in, once all arguments are found right."""
    if not probs.is_floating_point() or not boxes.is_floating_point():
        raise TypeError(f"probs and boxes must be floating point, they are {probs.dtype} and {boxes.dtype}")
    if probs.ndim != 3 or probs.shape[1] != probs.shape[2] or probs.shape[1] == 0:
        raise ValueError(f"probs must be [N, m, m], they are {list(probs.shape)}")
    if boxes.shape != (len(probs), 4):
        raise ValueError(f"boxes must be [{len(probs)}, 4], one for each mask, they are {list(boxes.shape)}")
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width), both at least 1, it is {tuple(image_size)}")
    probs = probs.detach()
    return probs if probs.dtype == torch.float64 else probs.float()


def _pasted_windows(
    probs: Tensor,  # [N, m, m]
    boxes: Tensor,  # [N, 4]
    image_size: tuple[int, int],
    threshold: float,
    paste: str,
) -> Iterator[tuple[Window, Tensor]]:
    """Each mask that shows in the picture: its window, and the window's bits, [h, w] on probs' device."""
    if paste == "grid":
        yield from grid_windows(probs, boxes, image_size, threshold)
        return
    if paste != "box":
        raise ValueError(f"paste must be 'box' or 'grid', it is {paste!r}")
    padded = F.pad(probs, (1, 1, 1, 1))  # [N, m + 2, m + 2]
    # The dtype of the boxes decides how their corners round; half precision could not hold corners at all.
    corners = boxes.detach().cpu()
    corners = corners if corners.dtype == torch.float64 else corners.float()
    for window in box_windows(corners.numpy(), probs.shape[-1], image_size):
        mask = padded[window.number]  # [m + 2, m + 2]
        visible = (window.bottom - window.top) * (window.right - window.left)
        rows = slice(window.top - window.box_top, window.bottom - window.box_top)
        columns = slice(window.left - window.box_left, window.right - window.box_left)
        size = (window.box_height, window.box_width)
        if size[0] * size[1] <= max(_WHOLE_BOX_FACTOR * visible, _WHOLE_BOX_PIXELS):
            resized = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)
            yield window, resized[0, 0, rows, columns] >= threshold
        else:
            yield window, _window_bits(mask, size, rows, columns, threshold)


def _window_bits(
    mask: Tensor,  # [s, s]
    size: tuple[int, int],
    rows: slice,
    columns: slice,
    threshold: float,
) -> Tensor:  # [h, w]
    """Bits of a window of `F.interpolate(mask, size)`, computed in blocks of rows."""
    h, w = rows.stop - rows.start, columns.stop - columns.start
    bits = torch.empty((h, w), dtype=torch.bool, device=mask.device)
    step = max(1, _BLOCK_PIXELS // w)
    for begin in range(0, h, step):
        end = min(begin + step, h)
        block = slice(rows.start + begin, rows.start + end)
        values = _window_values(mask, size, block, columns, _multiply_add_is_fused(mask.device))
        bits[begin:end] = values >= threshold
    return bits


def _window_values(
    mask: Tensor,  # [s, s]
    size: tuple[int, int],
    rows: slice,
    columns: slice,
    fused: bool,
) -> Tensor:  # [h, w]
    """A window of `F.interpolate(mask, size)`, equal to the last bit, without computing the rest.

    The value of a pixel is a weighted sum of four neighbours, and whether it reaches the threshold may hang
    on its last bit (where all four are 0.5, for example). So this takes the same steps in the same order as
    PyTorch's kernels, which on most machines are compiled to fused multiply-adds (`fused`).
    """
    above, below, weight_above, weight_below = _neighbours(mask, size[0], rows, fused)  # [h] each
    before, after, weight_before, weight_after = _neighbours(mask, size[1], columns, fused)  # [w] each
    across = _multiply_add(mask[:, before], weight_before, mask[:, after] * weight_after, fused)  # [s, w]
    lower = across[below] * weight_below[:, None]  # [h, w]
    return _multiply_add(across[above], weight_above[:, None], lower, fused)


def _neighbours(mask: Tensor, size: int, span: slice, fused: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each output pixel of `span` along one axis: its two source pixels, and the weight of each."""
    side = mask.shape[0]
    # Filled from NumPy scalars: the quotient has to be rounded once, in the dtype of the mask.
    real = np.float64 if mask.dtype == torch.float64 else np.float32
    scale = mask.new_tensor(float(real(side) / real(size)))
    middle = torch.arange(span.start, span.stop, device=mask.device).to(mask.dtype) + 0.5
    source = _multiply_add(middle, scale, mask.new_tensor(-0.5), fused).clamp(min=0)
    first = source.to(torch.int64).clamp(max=side - 1)
    weight = (source - first).clamp(max=1)
    return first, (first + 1).clamp(max=side - 1), 1 - weight, weight


def _multiply_add(factor: Tensor, other: Tensor, addend: Tensor, fused: bool) -> Tensor:
    """factor * other + addend, rounded once where `fused` (float32 only), twice otherwise."""
    if fused and factor.dtype == torch.float32:
        # A product of two float32 is exact in float64.
        return (factor.double() * other.double() + addend.double()).float()
    return factor * other + addend


@cache
def _multiply_add_is_fused(device: torch.device) -> bool:
    """Whether `F.interpolate` on this device uses fused multiply-adds: found by trying, once a device."""
    mask = torch.rand((30, 30), generator=torch.Generator().manual_seed(0)).to(device)
    size = (97, 61)
    expected = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    equal = {
        fused: int((_window_values(mask, size, slice(0, 97), slice(0, 61), fused) == expected).sum())
        for fused in (True, False)
    }
    return equal[True] >= equal[False]
