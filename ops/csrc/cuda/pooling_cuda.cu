// Features of RoIs plus the means of another head's, twice as fine or more, in one pass: by two passes of torch's own the
// fusion of mask proposal features took six times what its bytes take.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "channels_last.cuh"

namespace dsg {
namespace {

// R RoIs of H x W cells and C channels: features and output [R, C, H, W], finer [R, C, H * step, W * step], all
// channels-last. A thread has `kPack` channels of one cell.
template <typename scalar_t, int kPack>
__global__ void __launch_bounds__(kThreads) add_pooled_kernel(
    const scalar_t* __restrict__ features, const scalar_t* __restrict__ finer, int64_t packs, int packs_of_cell,
    int height, int width, int step, scalar_t* __restrict__ output) {
  const float share = 1.0f / static_cast<float>(step * step);
  const int64_t row_of_finer = int64_t{width} * step * packs_of_cell;  // packs
  for (int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x; item < packs;
       item += gridDim.x * int64_t{kThreads}) {
    const int64_t cell = item / packs_of_cell, channel = item % packs_of_cell;
    const int64_t column = cell % width, row = cell / width;  // rows of all RoIs, one after the other
    const int64_t first = row * step * row_of_finer + column * step * packs_of_cell + channel;
    float sums[kPack] = {};
    for (int y = 0; y < step; ++y) {
      for (int x = 0; x < step; ++x) {
        float values[kPack];
        load_pack(finer + (first + y * row_of_finer + int64_t{x} * packs_of_cell) * kPack, values);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          sums[i] += values[i];
        }
      }
    }
    float own[kPack];
    load_pack(features + item * kPack, own);
    Pack<scalar_t, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      result.values[i] = static_cast<scalar_t>(own[i] + sums[i] * share);
    }
    *reinterpret_cast<Pack<scalar_t, kPack>*>(output + item * kPack) = result;
  }
}

void add_pooled(const Tensor& features, const Tensor& finer, int64_t step, Tensor output) {
  STD_TORCH_CHECK(
      features.dim() == 4 && finer.dim() == 4 && output.dim() == 4 && step >= 1, "dsg: features must be [R, C, H, W]");
  const int64_t count = features.size(0), channels = features.size(1);
  const int64_t height = features.size(2), width = features.size(3);
  STD_TORCH_CHECK(
      finer.size(0) == count && finer.size(1) == channels && finer.size(2) == height * step &&
          finer.size(3) == width * step,
      "dsg: the finer features must have `step` times the cells of the others along each axis");
  for (const Tensor& one : {features, finer, Tensor(output)}) {
    STD_TORCH_CHECK(
        one.device() == features.device() && one.scalar_type() == features.scalar_type() && is_dense_channels_last(one),
        "dsg: features to be added must be channels-last, of one kind and on one device");
  }
  STD_TORCH_CHECK(
      output.size(0) == count && output.size(1) == channels && output.size(2) == height && output.size(3) == width,
      "dsg: the output must be as large as the features");
  if (features.numel() == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  dispatch_single(features.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kPack = 16 / sizeof(scalar_t);
    STD_TORCH_CHECK(channels % kPack == 0, "dsg: channels must be a multiple of 8, in float32 of 4");
    const int64_t packs = features.numel() / kPack;
    add_pooled_kernel<scalar_t, kPack><<<blocks_for(packs), kThreads, 0, current_stream(features)>>>(
        static_cast<const scalar_t*>(features.const_data_ptr()), static_cast<const scalar_t*>(finer.const_data_ptr()),
        packs, static_cast<int>(channels / kPack), static_cast<int>(height), static_cast<int>(width),
        static_cast<int>(step), static_cast<scalar_t*>(output.mutable_data_ptr()));
    check_launch("the sum with pooled features");
  });
}

}  // namespace

// Defined here and nowhere else: what runs without CUDA does the same in steps, see `add_pooled` in the network's layers.
STABLE_TORCH_LIBRARY_FRAGMENT(dsg, library) {
  library.def("add_pooled(Tensor features, Tensor finer, int step, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dsg, CUDA, library) {
  library.impl("add_pooled", TORCH_BOX(&add_pooled));
}

}  // namespace dsg
