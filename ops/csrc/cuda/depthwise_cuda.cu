// Depthwise convolution with what surrounds it, ReLU6 before, bias and ReLU6 after, in one pass. cuDNN compiles a kernel
// of its own for each size of picture that it meets, a quarter of a second a layer; this one takes all sizes.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "channels_last.cuh"

namespace dsg {
namespace {

constexpr float kCeiling = 6.0f;
constexpr int kStrip = 4;  // neighbouring cells of a row that a thread computes

__device__ __forceinline__ float relu6(float value) { return fminf(fmaxf(value, 0.0f), kCeiling); }

struct DepthwiseShape {
  int64_t strips;  // of the output, of all channels
  int packs_of_cell;  // groups of `kPack` channels
  int strips_of_row;
  int height, width, out_height, out_width;
};

// B images, C channels: input [B, C, H, W], output [B, C, H / kStride, W / kStride] rounded up, channels-last; weight
// [kSize * kSize, C], bias [C]. A thread has `kPack` channels of `kStrip` cells; what it reads of a row serves them all.
template <typename in_t, typename out_t, int kPack, int kSize, int kStride>
__global__ void __launch_bounds__(kThreads) depthwise_kernel(
    const in_t* __restrict__ input, const float* __restrict__ weight, const float* __restrict__ bias,
    DepthwiseShape shape, out_t* __restrict__ output) {
  constexpr int kReach = (kStrip - 1) * kStride + kSize;  // cells of a row that a strip reads
  const int64_t channels = int64_t{shape.packs_of_cell} * kPack;
  for (int64_t item = blockIdx.x * int64_t{kThreads} + threadIdx.x; item < shape.strips;
       item += gridDim.x * int64_t{kThreads}) {
    const int64_t channel = item % shape.packs_of_cell * kPack;
    const int64_t strip = item / shape.packs_of_cell;
    const int first_column = static_cast<int>(strip % shape.strips_of_row) * kStrip;
    const int64_t row = strip / shape.strips_of_row;  // of all images, one after the other
    const int64_t image = row / shape.out_height;
    const int top = static_cast<int>(row % shape.out_height) * kStride - kSize / 2;
    const int left = first_column * kStride - kSize / 2;
    float sums[kStrip][kPack], start[kPack];
    load_pack(bias + channel, start);
#pragma unroll
    for (int s = 0; s < kStrip; ++s) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        sums[s][i] = start[i];
      }
    }
#pragma unroll
    for (int ky = 0; ky < kSize; ++ky) {
      const int y = top + ky;
      if (y < 0 || y >= shape.height) {
        continue;
      }
      float weights[kSize][kPack];
#pragma unroll
      for (int kx = 0; kx < kSize; ++kx) {
        load_pack(weight + (ky * kSize + kx) * channels + channel, weights[kx]);
      }
      const in_t* cells = input + ((image * shape.height + y) * shape.width) * channels + channel;
#pragma unroll
      for (int j = 0; j < kReach; ++j) {
        const int x = left + j;
        if (x < 0 || x >= shape.width) {
          continue;
        }
        float values[kPack];
        load_pack(cells + x * channels, values);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          values[i] = relu6(values[i]);
        }
#pragma unroll
        for (int s = 0; s < kStrip; ++s) {
          const int kx = j - s * kStride;
          if (kx >= 0 && kx < kSize) {
#pragma unroll
            for (int i = 0; i < kPack; ++i) {
              sums[s][i] += values[i] * weights[kx][i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kStrip; ++s) {
      if (first_column + s < shape.out_width) {
        Pack<out_t, kPack> result;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          result.values[i] = static_cast<out_t>(relu6(sums[s][i]));
        }
        const int64_t cell = row * shape.out_width + first_column + s;
        *reinterpret_cast<Pack<out_t, kPack>*>(output + cell * channels + channel) = result;
      }
    }
  }
}

template <typename in_t, typename out_t, int kSize, int kStride>
void launch_depthwise(const Tensor& input, const Tensor& weight, const Tensor& bias, Tensor& output) {
  constexpr int kPack = 16 / sizeof(in_t);
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(channels % kPack == 0, "dsg: channels must be a multiple of 8, in float32 of 4");
  DepthwiseShape shape{};
  shape.packs_of_cell = static_cast<int>(channels / kPack);
  shape.height = static_cast<int>(input.size(2));
  shape.width = static_cast<int>(input.size(3));
  shape.out_height = static_cast<int>(output.size(2));
  shape.out_width = static_cast<int>(output.size(3));
  shape.strips_of_row = (shape.out_width + kStrip - 1) / kStrip;
  shape.strips = output.size(0) * shape.out_height * shape.strips_of_row * shape.packs_of_cell;
  depthwise_kernel<in_t, out_t, kPack, kSize, kStride>
      <<<blocks_for(shape.strips), kThreads, 0, current_stream(input)>>>(
          static_cast<const in_t*>(input.const_data_ptr()), static_cast<const float*>(weight.const_data_ptr()),
          static_cast<const float*>(bias.const_data_ptr()), shape, static_cast<out_t*>(output.mutable_data_ptr()));
  check_launch("the depthwise convolution");
}

// The sizes that networks have: 3x3 and 5x5, every cell or every other.
template <typename in_t, typename out_t>
void launch_sized(
    const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t size, int64_t stride, Tensor& output) {
  if (size == 3) {
    return stride == 1 ? launch_depthwise<in_t, out_t, 3, 1>(input, weight, bias, output)
                       : launch_depthwise<in_t, out_t, 3, 2>(input, weight, bias, output);
  }
  return stride == 1 ? launch_depthwise<in_t, out_t, 5, 1>(input, weight, bias, output)
                     : launch_depthwise<in_t, out_t, 5, 2>(input, weight, bias, output);
}

void depthwise_relu6(
    const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t size, int64_t stride, Tensor output) {
  STD_TORCH_CHECK(
      (size == 3 || size == 5) && (stride == 1 || stride == 2), "dsg: depthwise kernels are 3x3 or 5x5, of stride 1 or 2");
  STD_TORCH_CHECK(
      input.dim() == 4 && output.dim() == 4 && is_dense_channels_last(input) && is_dense_channels_last(output),
      "dsg: input and output must be [B, C, H, W], channels-last");
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(
      output.size(0) == input.size(0) && output.size(1) == channels &&
          output.size(2) == (input.size(2) + stride - 1) / stride &&
          output.size(3) == (input.size(3) + stride - 1) / stride,
      "dsg: the output must have the input's cells, every one or every other");
  STD_TORCH_CHECK(
      weight.scalar_type() == ScalarType::Float && weight.numel() == size * size * channels && weight.is_contiguous() &&
          bias.scalar_type() == ScalarType::Float && bias.numel() == channels && bias.is_contiguous(),
      "dsg: weights must be float32 [size * size, C], biases float32 [C]");
  for (const Tensor& one : {weight, bias, Tensor(output)}) {
    STD_TORCH_CHECK(one.device() == input.device(), "dsg: the input and what goes with it are on several devices");
  }
  if (output.numel() == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  // Of one kind, or float32 in and half precision out.
  dispatch_single(output.scalar_type(), [&](auto zero) {
    using out_t = decltype(zero);
    if (input.scalar_type() == ScalarType::Float) {
      return launch_sized<float, out_t>(input, weight, bias, size, stride, output);
    }
    STD_TORCH_CHECK(input.scalar_type() == output.scalar_type(), "dsg: the output must be as wide as the input, or half");
    launch_sized<out_t, out_t>(input, weight, bias, size, stride, output);
  });
}

}  // namespace

// Defined here and nowhere else: what runs without CUDA does the same in steps, see the network's inverted residuals.
STABLE_TORCH_LIBRARY_FRAGMENT(dsg, library) {
  library.def(
      "depthwise_relu6(Tensor input, Tensor weight, Tensor bias, int size, int stride, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dsg, CUDA, library) {
  library.impl("depthwise_relu6", TORCH_BOX(&depthwise_relu6));
}

}  // namespace dsg
