// Pictures as they come, bytes, to what a backbone reads: normalised, channels-last, in one pass over the batch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "channels_last.cuh"

namespace dsg {
namespace {

constexpr int kColours = 3;


// B pictures of at most H x W: pixels [B, 3, H, W], output the same, channels-last.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) normalise_kernel(
    const unsigned char* __restrict__ pixels, const int64_t* __restrict__ sizes, int64_t count, int64_t height,
    int64_t width, const float* __restrict__ mean, const float* __restrict__ deviation, scalar_t* __restrict__ output) {
  const int64_t area = height * width;
  for (int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x; item < count * area;
       item += gridDim.x * int64_t{kThreads}) {
    const int64_t image = item / area, place = item % area, row = place / width, column = place % width;
    const bool inside = row < sizes[image * 2] && column < sizes[image * 2 + 1];
#pragma unroll
    for (int colour = 0; colour < kColours; ++colour) {
      const float value = __fdiv_rn(static_cast<float>(pixels[(image * kColours + colour) * area + place]), 255.0f);
      const float normalised = __fdiv_rn(__fadd_rn(value, -mean[colour]), deviation[colour]);
      output[item * kColours + colour] = static_cast<scalar_t>(inside ? normalised : 0.0f);
    }
  }
}

void normalise_pixels(
    const Tensor& pixels, const Tensor& sizes, const Tensor& mean, const Tensor& deviation, Tensor output) {
  const int64_t count = pixels.size(0), height = pixels.size(2), width = pixels.size(3);
  STD_TORCH_CHECK(
      pixels.dim() == 4 && pixels.size(1) == kColours && pixels.scalar_type() == ScalarType::Byte &&
          pixels.is_contiguous(),
      "dsg: pixels must be uint8 [B, 3, H, W] and contiguous");
  STD_TORCH_CHECK(
      sizes.scalar_type() == ScalarType::Long && sizes.numel() == count * 2 && sizes.is_contiguous(),
      "dsg: sizes must be int64 [B, 2]");
  for (const Tensor& one : {mean, deviation}) {
    STD_TORCH_CHECK(
        one.scalar_type() == ScalarType::Float && one.numel() == kColours && one.is_contiguous(),
        "dsg: mean and deviation must be float32 [3]");
  }
  STD_TORCH_CHECK(
      output.dim() == 4 && output.numel() == pixels.numel() && output.stride(1) == 1 && output.stride(3) == kColours,
      "dsg: the output must be as large as the pixels, and channels-last");
  for (const Tensor& one : {sizes, mean, deviation, Tensor(output)}) {
    STD_TORCH_CHECK(one.device() == pixels.device(), "dsg: pixels and what goes with them are on several devices");
  }
  if (pixels.numel() == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  dispatch_single(output.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    normalise_kernel<scalar_t><<<blocks_for(count * height * width), kThreads, 0, current_stream(pixels)>>>(
        static_cast<const unsigned char*>(pixels.const_data_ptr()), static_cast<const int64_t*>(sizes.const_data_ptr()),
        count, height, width, static_cast<const float*>(mean.const_data_ptr()),
        static_cast<const float*>(deviation.const_data_ptr()), static_cast<scalar_t*>(output.mutable_data_ptr()));
    check_launch("the normalisation of pixels");
  });
}

}  // namespace

// Defined here and nowhere else: what runs without CUDA does the same in steps, see `normalise` in the network's batches.
STABLE_TORCH_LIBRARY_FRAGMENT(dsg, library) {
  library.def("normalise_pixels(Tensor pixels, Tensor sizes, Tensor mean, Tensor deviation, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dsg, CUDA, library) {
  library.impl("normalise_pixels", TORCH_BOX(&normalise_pixels));
}

}  // namespace dsg
