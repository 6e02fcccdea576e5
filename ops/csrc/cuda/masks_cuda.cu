// Masks to COCO's compressed run lengths on CUDA, in four steps that `ops/cuda_masks.py` puts together. A thread walks
// one column of one mask, so that the work grows with the boxes' areas and nothing the size of a picture is held.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "mask_columns.cuh"
#include "pyramid.cuh"

namespace dsg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// N masks of m x m cells, each in a box of a picture; all pictures are at most `columns` wide.
struct Masks {
  const float* probs;  // [N, m, m]
  const float* boxes;  // [N, 4]
  const int64_t* sizes;  // [N, 2]: (H, W) of each one's picture
  int64_t count, columns;
  int cells;  // m
  float threshold;
};

// Calls `visit` with each change in the column that `item` stands for; returns its set pixels.
template <typename mask_t, typename visit_t>
__device__ __forceinline__ int32_t walk_item(const Masks& masks, int64_t item, const visit_t& visit) {
  const int64_t number = item / masks.columns, column = item % masks.columns;
  const int64_t height = masks.sizes[number * 2], width = masks.sizes[number * 2 + 1];
  const float* probs = masks.probs + number * masks.cells * masks.cells;
  const mask_t mask(probs, masks.cells, masks.boxes + number * 4, height, width);
  if (!mask.window.empty() && column >= mask.window.left && column < mask.window.right) {
    return walk_column(mask, column, height, masks.threshold, visit);
  }
  return 0;
}

template <typename mask_t>
__global__ void __launch_bounds__(kThreads) count_kernel(const Masks masks, int64_t* __restrict__ counts) {
  const int64_t items = masks.count * masks.columns;
  for (int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x; item < items;
       item += gridDim.x * int64_t{kThreads}) {
    int64_t found = 0;
    counts[items + item] = walk_item<mask_t>(masks, item, [&](int64_t) { ++found; });
    counts[item] = found;
  }
}

template <typename mask_t>
__global__ void __launch_bounds__(kThreads) change_kernel(
    const Masks masks, const int64_t* __restrict__ ends, int32_t* __restrict__ changes) {
  for (int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x; item < masks.count * masks.columns;
       item += gridDim.x * int64_t{kThreads}) {
    int32_t* target = changes + (item == 0 ? 0 : ends[item - 1]);
    walk_item<mask_t>(masks, item, [&](int64_t place) { *target++ = static_cast<int32_t>(place); });
  }
}

// Slots: one for each change, and one more at each mask's end, for the run that follows its last change.
struct Slots {
  const int32_t* changes;
  const int64_t* ends;  // [N]: of each mask's changes
  const int64_t* sizes;
  int64_t count;

  // The number that a slot writes; false where it writes none.
  __device__ __forceinline__ bool number_of(int64_t slot, int64_t& number) const {
    int64_t low = 0, high = count - 1;  // the first mask whose slots end after this one
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] + middle + 1 > slot) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t begin = low == 0 ? 0 : ends[low - 1];
    const RunCounts runs{changes + begin, ends[low] - begin, sizes[low * 2] * sizes[low * 2 + 1]};
    const int64_t index = slot - begin - low;
    if (index >= runs.counts()) {
      return false;
    }
    number = runs.written(index);
    return true;
  }
};

__global__ void __launch_bounds__(kThreads) length_kernel(
    const Slots slots, int64_t total, int64_t* __restrict__ lengths) {
  for (int64_t slot = blockIdx.x * int64_t{kThreads} + threadIdx.x; slot < total; slot += gridDim.x * int64_t{kThreads}) {
    int64_t number;
    int64_t length = 0;
    if (slots.number_of(slot, number)) {
      write_number(number, [&](unsigned char) { ++length; });
    }
    lengths[slot] = length;
  }
}

__global__ void __launch_bounds__(kThreads) text_kernel(
    const Slots slots, int64_t total, const int64_t* __restrict__ ends, unsigned char* __restrict__ text) {
  for (int64_t slot = blockIdx.x * int64_t{kThreads} + threadIdx.x; slot < total; slot += gridDim.x * int64_t{kThreads}) {
    int64_t number;
    if (slots.number_of(slot, number)) {
      unsigned char* target = text + (slot == 0 ? 0 : ends[slot - 1]);
      write_number(number, [&](unsigned char character) { *target++ = character; });
    }
  }
}

__global__ void __launch_bounds__(kThreads) cut_kernel(
    const int64_t* __restrict__ text_ends, const int64_t* __restrict__ ends, int64_t count, int64_t* __restrict__ cuts) {
  for (int64_t number = blockIdx.x * int64_t{kThreads} + threadIdx.x; number < count;
       number += gridDim.x * int64_t{kThreads}) {
    cuts[number] = text_ends[ends[number] + number];
  }
}

void check(const Tensor& tensor, const char* name, ScalarType type, int64_t dims, const Tensor& beside) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.dim() == dims && tensor.is_contiguous(), "dsg: ", name,
      " is not of the dtype and shape that this takes, or not contiguous");
  STD_TORCH_CHECK(tensor.device() == beside.device(), "dsg: ", name, " is on another device");
}

Masks make_masks(const Tensor& probs, const Tensor& boxes, const Tensor& sizes, int64_t columns, double threshold) {
  check(probs, "probs", ScalarType::Float, 3, probs);
  check(boxes, "boxes", ScalarType::Float, 2, probs);
  check(sizes, "sizes", ScalarType::Long, 2, probs);
  const int64_t count = probs.size(0), cells = probs.size(1);
  STD_TORCH_CHECK(
      probs.size(2) == cells && cells > 0 && boxes.size(0) == count && boxes.size(1) == 4 && sizes.size(0) == count &&
          sizes.size(1) == 2,
      "dsg: probs must be [N, m, m], boxes [N, 4] and sizes [N, 2]");
  return {
      static_cast<const float*>(probs.const_data_ptr()),
      static_cast<const float*>(boxes.const_data_ptr()),
      static_cast<const int64_t*>(sizes.const_data_ptr()),
      count,
      columns,
      static_cast<int>(cells),
      static_cast<float>(threshold)};
}

// int64 [2, N, columns]: how often each column changes, and how many of its pixels are set.
Tensor mask_column_counts(
    const Tensor& probs, const Tensor& boxes, const Tensor& sizes, int64_t columns, double threshold, bool on_grid) {
  const Masks masks = make_masks(probs, boxes, sizes, columns, threshold);
  const DeviceGuard guard(probs.get_device_index());
  const Tensor counts = torch::stable::new_empty(probs, {2, masks.count, columns}, ScalarType::Long);
  if (counts.numel() > 0) {
    const auto kernel = on_grid ? count_kernel<GridMask> : count_kernel<BoxMask>;
    kernel<<<blocks_for(masks.count * columns), kThreads, 0, current_stream(probs)>>>(
        masks, static_cast<int64_t*>(counts.mutable_data_ptr()));
    check_launch("the counts of a mask's columns");
  }
  return counts;
}

// int32 [total]: where the pixels change, mask after mask. ends int64 [N * columns]: running sums of the counts.
Tensor mask_changes(
    const Tensor& probs, const Tensor& boxes, const Tensor& sizes, int64_t columns, double threshold,
    bool on_grid, const Tensor& ends, int64_t total) {
  const Masks masks = make_masks(probs, boxes, sizes, columns, threshold);
  check(ends, "ends", ScalarType::Long, 1, probs);
  STD_TORCH_CHECK(ends.size(0) == masks.count * columns, "dsg: ends must have an entry for each column");
  const DeviceGuard guard(probs.get_device_index());
  const Tensor changes = torch::stable::new_empty(probs, {total}, ScalarType::Int);
  if (total > 0) {
    const auto kernel = on_grid ? change_kernel<GridMask> : change_kernel<BoxMask>;
    kernel<<<blocks_for(ends.numel()), kThreads, 0, current_stream(probs)>>>(
        masks, static_cast<const int64_t*>(ends.const_data_ptr()), static_cast<int32_t*>(changes.mutable_data_ptr()));
    check_launch("the list of a mask's changes");
  }
  return changes;
}

Slots make_slots(const Tensor& changes, const Tensor& ends, const Tensor& sizes) {
  check(changes, "changes", ScalarType::Int, 1, changes);
  check(ends, "ends", ScalarType::Long, 1, changes);
  check(sizes, "sizes", ScalarType::Long, 2, changes);
  STD_TORCH_CHECK(sizes.size(0) == ends.size(0) && sizes.size(1) == 2, "dsg: sizes must be [N, 2] as ends are [N]");
  return {
      static_cast<const int32_t*>(changes.const_data_ptr()), static_cast<const int64_t*>(ends.const_data_ptr()),
      static_cast<const int64_t*>(sizes.const_data_ptr()), ends.size(0)};
}

// int64 [total + N]: characters of each slot. ends int64 [N]: of each mask's changes.
Tensor rle_lengths(const Tensor& changes, const Tensor& ends, const Tensor& sizes) {
  const Slots slots = make_slots(changes, ends, sizes);
  const DeviceGuard guard(changes.get_device_index());
  const Tensor lengths = torch::stable::new_empty(changes, {changes.size(0) + slots.count}, ScalarType::Long);
  if (lengths.numel() > 0) {
    length_kernel<<<blocks_for(lengths.numel()), kThreads, 0, current_stream(changes)>>>(
        slots, lengths.numel(), static_cast<int64_t*>(lengths.mutable_data_ptr()));
    check_launch("the lengths of run lengths");
  }
  return lengths;
}

void check_text_ends(const Tensor& text_ends, int64_t slots, const Tensor& beside) {
  check(text_ends, "text_ends", ScalarType::Long, 1, beside);
  STD_TORCH_CHECK(text_ends.size(0) == slots, "dsg: text_ends must have an entry a slot");
}

// int64 [N]: where each mask's string ends. text_ends int64 [total + N]: running sums of the lengths; ends int64 [N]: of
// each mask's changes.
Tensor rle_cuts(const Tensor& text_ends, const Tensor& ends, int64_t total) {
  check(ends, "ends", ScalarType::Long, 1, text_ends);
  check_text_ends(text_ends, total + ends.size(0), text_ends);
  const DeviceGuard guard(ends.get_device_index());
  const Tensor cuts = torch::stable::new_empty(ends, {ends.size(0)}, ScalarType::Long);
  if (cuts.numel() > 0) {
    cut_kernel<<<blocks_for(cuts.numel()), kThreads, 0, current_stream(ends)>>>(
        static_cast<const int64_t*>(text_ends.const_data_ptr()), static_cast<const int64_t*>(ends.const_data_ptr()),
        cuts.numel(), static_cast<int64_t*>(cuts.mutable_data_ptr()));
    check_launch("the ends of run lengths");
  }
  return cuts;
}

// uint8 [characters]: the strings one after another. text_ends int64 [total + N]: running sums of the lengths.
Tensor rle_text(
    const Tensor& changes, const Tensor& ends, const Tensor& sizes, const Tensor& text_ends, int64_t characters) {
  const Slots slots = make_slots(changes, ends, sizes);
  check_text_ends(text_ends, changes.size(0) + slots.count, changes);
  const DeviceGuard guard(changes.get_device_index());
  const Tensor text = torch::stable::new_empty(changes, {characters}, ScalarType::Byte);
  if (characters > 0) {
    text_kernel<<<blocks_for(text_ends.numel()), kThreads, 0, current_stream(changes)>>>(
        slots, text_ends.numel(), static_cast<const int64_t*>(text_ends.const_data_ptr()),
        static_cast<unsigned char*>(text.mutable_data_ptr()));
    check_launch("the text of run lengths");
  }
  return text;
}

}  // namespace

// Defined here and nowhere else: what runs without CUDA has masks of its own, see `ops/masks.py`.
STABLE_TORCH_LIBRARY_FRAGMENT(dsg, library) {
  library.def(
      "mask_column_counts(Tensor probs, Tensor boxes, Tensor sizes, int columns, float threshold, bool on_grid) "
      "-> Tensor");
  library.def(
      "mask_changes(Tensor probs, Tensor boxes, Tensor sizes, int columns, float threshold, bool on_grid, Tensor ends, "
      "int total) -> Tensor");
  library.def("rle_lengths(Tensor changes, Tensor ends, Tensor sizes) -> Tensor");
  library.def("rle_cuts(Tensor text_ends, Tensor ends, int total) -> Tensor");
  library.def("rle_text(Tensor changes, Tensor ends, Tensor sizes, Tensor text_ends, int characters) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dsg, CUDA, library) {
  library.impl("mask_column_counts", TORCH_BOX(&mask_column_counts));
  library.impl("mask_changes", TORCH_BOX(&mask_changes));
  library.impl("rle_lengths", TORCH_BOX(&rle_lengths));
  library.impl("rle_cuts", TORCH_BOX(&rle_cuts));
  library.impl("rle_text", TORCH_BOX(&rle_text));
}

}  // namespace dsg
