"""What a GPU's thread does with a column of a mask, run on the CPU, against pycocotools."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import dsg.ops
from dsg.ops.masks import _window_values, paste_masks
from dsg.ops.windows import box_windows

COMPILER = shutil.which("c++") or shutil.which("g++")
PROGRAM = """
#include <vector>
#include "mask_columns.cuh"
template <typename mask_t>
int run(
    const float* probs, int cells, const float* box, int64_t height, int64_t width, float threshold, char* text,
    int64_t* pixels) {
  const mask_t mask(probs, cells, box, height, width);
  std::vector<int32_t> changes;
  for (int64_t column = mask.window.left; column < mask.window.right && !mask.window.empty(); ++column) {
    *pixels += dsg::walk_column(mask, column, height, threshold,
                                [&](int64_t place) { changes.push_back(static_cast<int32_t>(place)); });
  }
  const dsg::RunCounts runs{changes.data(), static_cast<int64_t>(changes.size()), height * width};
  int length = 0;
  for (int64_t index = 0; index < runs.counts(); ++index) {
    dsg::write_number(runs.written(index), [&](unsigned char one) { text[length++] = one; });
  }
  return length;
}
extern "C" int encode(
    const float* probs, int cells, const float* box, int64_t height, int64_t width, float threshold, bool on_grid,
    char* text, int64_t* pixels) {
  return on_grid ? run<dsg::GridMask>(probs, cells, box, height, width, threshold, text, pixels)
                 : run<dsg::BoxMask>(probs, cells, box, height, width, threshold, text, pixels);
}
"""


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("columns")
    (folder / "columns.cpp").write_text(PROGRAM)
    headers = Path(dsg.ops.__file__).parent / "csrc" / "cuda"
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{headers}"]
    subprocess.run([COMPILER, *options, "columns.cpp", "-o", "columns.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "columns.so"))

    def run(
        probs: torch.Tensor, box: torch.Tensor, size: tuple[int, int], threshold: float, on_grid: bool
    ) -> tuple[str, int]:
        text, pixels = ctypes.create_string_buffer(1 << 20), ctypes.c_int64()
        values, corners = probs.contiguous().numpy(), box.contiguous().numpy()
        pointer = ctypes.c_void_p
        length = library.encode(
            values.ctypes.data_as(pointer),
            len(values),
            corners.ctypes.data_as(pointer),
            *map(ctypes.c_int64, size),
            ctypes.c_float(threshold),
            ctypes.c_bool(on_grid),
            text,
            ctypes.byref(pixels),
        )
        return text.raw[:length].decode("ascii"), pixels.value

    return run


def pasted(probs: torch.Tensor, box: torch.Tensor, size: tuple[int, int], threshold: float) -> np.ndarray:
    """uint8 [H, W] with fused multiply-adds, as torch's resize has them on CUDA."""
    picture = np.zeros(size, np.uint8)
    padded = F.pad(probs, (1, 1, 1, 1))
    for window in box_windows(box[None].numpy(), len(probs), size):
        rows = slice(window.top - window.box_top, window.bottom - window.box_top)
        columns = slice(window.left - window.box_left, window.right - window.box_left)
        values = _window_values(padded, (window.box_height, window.box_width), rows, columns, fused=True)
        picture[window.top : window.bottom, window.left : window.right] = values >= threshold
    return picture


CASES = given(
    seed=st.integers(0, 2**31),
    cells=st.sampled_from([1, 2, 14, 28]),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    levels=st.sampled_from([2, 3, 1000]),
    threshold=st.sampled_from([0.5, 0.3, 1.0]),
    reach=st.sampled_from(["inside", "all of it", "far beyond", "misses it", "not finite"]),
)


def made_up(seed, cells, size, levels, reach):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randint(0, levels, (cells, cells), generator=generator) / (levels - 1)
    height, width = size
    corners = torch.rand(4, generator=generator) * torch.tensor([width, height, width, height])
    boxes = {
        "inside": torch.cat([corners[:2].minimum(corners[2:]), corners[:2].maximum(corners[2:])]),
        "all of it": torch.tensor([-3.0, -2.0, width + 4.0, height + 5.0]),
        "far beyond": torch.tensor([-50.0 * width, -3.0, 40.0 * width, 60.0 * height]),
        "misses it": torch.tensor([width + 90.0, 0.0, width + 95.0, 9.0]),
        "not finite": torch.tensor([0.0, float("nan"), 9.0, float("inf")]),
    }
    return probs, boxes[reach]


@settings(deadline=None, max_examples=200)
@CASES
def test_changes_of_columns_make_the_counts_of_the_pasted_mask(encode, seed, cells, size, levels, threshold, reach):
    probs, box = made_up(seed, cells, size, levels, reach)
    expected = coco_mask.encode(np.asfortranarray(pasted(probs, box, size, threshold)))
    found = encode(probs, box, size, threshold, False)
    assert found == (expected["counts"].decode("ascii"), coco_mask.area(expected))


@settings(deadline=None, max_examples=200)
@CASES
def test_masks_on_a_grid_are_those_of_torch_but_for_ties(encode, seed, cells, size, levels, threshold, reach):
    probs, box = made_up(seed, cells, size, levels, reach)
    counts, pixels = encode(probs, box, size, threshold, True)
    found = coco_mask.decode({"size": list(size), "counts": counts.encode()}).astype(bool)
    assert pixels == found.sum()
    # What rounding may tip either way: between a mask of a slightly higher threshold and one of a slightly lower.
    least, most = (
        paste_masks(probs[None], box[None], size, threshold * (1 + slack), paste="grid")[0].numpy()
        for slack in (1e-4, -1e-4)
    )
    assert (least <= found).all() and (found <= most).all()
