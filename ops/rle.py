"""COCO run-length encoding in NumPy: masks, counts and the compressed string, without Python loops.

An RLE is `{"size": [height, width], "counts": str}`. The picture is read column by column, top to bottom;
the counts are lengths of alternating runs and begin with zeros (a mask whose first pixel is set begins with
a count of 0). The string holds each count from the fourth on as the difference to the count two before it,
as a signed number in groups of 5 bits, the lowest first: bit 5 says that another group follows, and 48 is
added so that each group is a printable character. Needs no torch.

Letters: `H, W` size of the picture, `h, w` size of a window in it, `n` number of counts.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GROUP_BITS = 5
_MORE = 0x20  # another group of this number follows
_SIGN = 0x10  # sign bit of a number's last group
_OFFSET = 48
_MAX_GROUPS = 12  # 60 bits: more than the pixels of any picture, and no overflow of int64


def window_counts(
    bits: NDArray[np.bool_],  # [h, w]
    top: int,
    left: int,
    image_size: tuple[int, int],
) -> NDArray[np.int64]:  # [n]
    """Counts of a picture that is zero outside a window.

    Args:
        bits: bool [h, w], the pixels of the window.
        top, left: the window's first row and column; the window lies inside the picture.
        image_size: (H, W) of the picture.

    Time and memory grow with h * w, not with the picture.
    """
    h, w = bits.shape
    height, width = image_size
    if not (0 <= top <= top + h <= height and 0 <= left <= left + w <= width):
        raise ValueError(
            f"a window of {h}x{w} at row {top}, column {left} does not lie in a picture of {height}x{width}"
        )
    # A zero before everything and one after each column, so that every run begins and ends inside its column.
    flat = np.zeros(1 + w * (h + 1), dtype=np.bool_)
    flat[1:].reshape(w, h + 1)[:, :h] = bits.T
    changes = np.flatnonzero(flat[1:] != flat[:-1])  # start, end, start, end, ...
    column, row = np.divmod(changes, h + 1)
    changes = (left + column) * height + top + row
    if h == height:
        # A run that ends at the bottom and one that starts at the next column's top are one run.
        touching = changes[1:] == changes[:-1]
        keep = np.ones(len(changes), dtype=np.bool_)
        keep[1:] &= ~touching
        keep[:-1] &= ~touching
        changes = changes[keep]
    edges = np.concatenate(([0], changes, [height * width]))
    counts = edges[1:] - edges[:-1]
    # No run of zeros is written after the last pixel, but a picture without a pixel set is one run of zeros.
    return counts[:-1] if len(changes) and changes[-1] == height * width else counts


def counts_to_strings(counts: Sequence[NDArray[np.int64]]) -> list[str]:
    """COCO's compressed strings of several lists of counts, in one pass over all of them."""
    if not counts:
        return []
    lengths = np.array([len(one) for one in counts])  # [masks]
    values = np.concatenate(counts).astype(np.int64)  # [n], of all masks
    starts = np.cumsum(lengths) - lengths  # [masks]
    position = np.arange(len(values)) - np.repeat(starts, lengths)  # [n], within its mask
    delta = values.copy()
    delta[2:] -= np.where(position[2:] > 2, values[:-2], 0)

    groups: list[NDArray[np.uint8]] = []
    present: list[NDArray[np.bool_]] = []
    rest, more = delta, np.ones(len(delta), dtype=np.bool_)
    while more.any():
        present.append(more)
        group = rest & 0x1F
        rest = rest >> _GROUP_BITS
        # The number ends where all that is left repeats the sign bit of this group.
        more = more & (rest != np.where(group & _SIGN, -1, 0))
        groups.append((group + np.where(more, _MORE, 0) + _OFFSET).astype(np.uint8))
    if not groups:
        return [""] * len(counts)
    characters = np.stack(groups, axis=1)[np.stack(present, axis=1)]  # [n, groups] -> [characters]
    text = characters.tobytes().decode("ascii")
    ends = np.concatenate(([0], np.cumsum(np.sum(present, axis=0))))  # [n + 1], in the text
    cuts = ends[np.concatenate((starts, [len(values)]))].tolist()  # [masks + 1]
    return [text[begin:end] for begin, end in pairwise(cuts)]


def counts_to_string(counts: NDArray[np.int64] | Sequence[int]) -> str:
    """COCO's compressed string of one list of counts [n]."""
    return counts_to_strings([np.asarray(counts, dtype=np.int64)])[0]


def strings_to_counts(texts: Sequence[str | bytes]) -> list[NDArray[np.int64]]:
    """Counts of several compressed strings, in one pass over all of them.

    Raises:
        ValueError: a character that the code does not use, or an end in the middle of a number.
    """
    try:
        raw = [text.encode("ascii") if isinstance(text, str) else bytes(text) for text in texts]
    except UnicodeEncodeError:
        raise ValueError("RLE counts hold a character outside ASCII") from None
    codes = np.frombuffer(b"".join(raw), dtype=np.uint8).astype(np.int64) - _OFFSET  # [characters]
    if len(codes) == 0:
        return [np.zeros(0, dtype=np.int64) for _ in texts]
    if codes.min() < 0 or codes.max() >= 2 * _MORE:
        raise ValueError("RLE counts are cut off or hold a character outside '0' to 'o'")
    lengths = np.array([len(one) for one in raw])  # [texts]
    text_ends = np.cumsum(lengths)
    last = (codes & _MORE) == 0
    if not last[text_ends[lengths > 0] - 1].all():
        raise ValueError("RLE counts end in the middle of a number")
    ends = np.flatnonzero(last)  # [n], of all texts, as all that follows
    starts = np.concatenate(([0], ends[:-1] + 1))
    sizes = ends - starts + 1  # groups of each number
    if sizes.max() > _MAX_GROUPS:
        raise ValueError(f"RLE counts hold a number of more than {_MAX_GROUPS} groups")
    place = np.arange(len(codes)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 0x1F) << (_GROUP_BITS * place), starts)
    negative = (codes[ends] & _SIGN) != 0
    numbers -= np.where(negative, np.int64(1) << (_GROUP_BITS * sizes), 0)

    cuts = np.concatenate(([0], np.cumsum(last)))[np.concatenate(([0], text_ends))]  # [texts + 1]
    position = np.arange(len(numbers)) - np.repeat(cuts[:-1], np.diff(cuts))
    # Undo the differences: the first count stands alone, every other one adds to the one two before it.
    for first in (1, 2):
        chosen = np.flatnonzero((position >= first) & ((position - first) % 2 == 0))
        own = numbers[chosen]
        sums = np.cumsum(own)
        begins = np.flatnonzero(position[chosen] == first)
        before = (sums - own)[begins]  # what the texts before this one add up to
        numbers[chosen] = sums - np.repeat(before, np.diff(begins, append=len(chosen)))
    return [numbers[begin:end] for begin, end in pairwise(cuts.tolist())]


def string_to_counts(text: str | bytes) -> NDArray[np.int64]:  # [n]
    """Counts of one compressed string; raises ValueError as `strings_to_counts` does."""
    return strings_to_counts([text])[0]


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO RLE of a mask [H, W] (bool, or numbers where anything but 0 is set)."""
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask is [H, W], this one has shape {list(mask.shape)}")
    counts = window_counts(mask.astype(np.bool_, copy=False), 0, 0, mask.shape)
    return {"size": list(mask.shape), "counts": counts_to_string(counts)}


def rles_counts(rles: Sequence[Mapping[str, Any]]) -> list[NDArray[np.int64]]:
    """Checked counts of several RLEs, compressed (str or bytes) or plain (lists of numbers).

    Raises:
        ValueError: no size or counts, a negative count, or counts that do not add up to H * W.
    """
    counts: list[Any] = []
    pixels: list[tuple[int, int]] = []
    for rle in rles:
        try:
            (height, width), of_one = rle["size"], rle["counts"]
        except (KeyError, TypeError, ValueError):
            raise ValueError("an RLE is {'size': [height, width], 'counts': ...}") from None
        pixels.append((height, width))
        counts.append(of_one)
    packed = [index for index, one in enumerate(counts) if isinstance(one, (str, bytes))]
    for index, numbers in zip(packed, strings_to_counts([counts[index] for index in packed]), strict=True):
        counts[index] = numbers
    for index, (height, width) in enumerate(pixels):
        counts[index] = np.asarray(counts[index], dtype=np.int64)
        total = int(counts[index].sum())
        if total != height * width:
            raise ValueError(f"RLE counts add up to {total}, which is not a picture of {height}x{width}")
        if (counts[index] < 0).any():
            raise ValueError("RLE counts hold a negative number")
    return counts


def rle_counts(rle: Mapping[str, Any]) -> NDArray[np.int64]:  # [n]
    """Checked counts of one RLE; raises ValueError as `rles_counts` does."""
    return rles_counts([rle])[0]


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:  # [H, W]
    """Mask of an RLE; raises ValueError as `rle_counts` does."""
    counts = rle_counts(rle)
    height, width = rle["size"]
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T  # [W, H] -> [H, W]


def rle_areas(rles: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of pixels that are set; raises ValueError as `rles_counts` does."""
    return [int(counts[1::2].sum()) for counts in rles_counts(rles)]
