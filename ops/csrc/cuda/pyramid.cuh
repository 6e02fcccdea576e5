// What the CUDA kernels take beside a Call, and how they are launched.
#pragma once

#include <cuda_runtime.h>

#include "../arguments.h"

namespace dsg {

// After every launch. Not torch's own macro for this: in 2.11's headers it does not compile.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "dsg: launching ", kernel, " failed: ", cudaGetErrorString(error));
}

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// A tensor [first, C, y, x] where it lies: any strides, so that no layout costs a copy.
template <typename scalar_t>
struct Image4 {
  scalar_t* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};

  __device__ __forceinline__ scalar_t& at(int64_t first, int64_t channel, int64_t y, int64_t x) const {
    return data[first * strides[0] + channel * strides[1] + y * strides[2] + x * strides[3]];
  }
};

// All levels, by value: a kernel argument, so that a pyramid is one launch.
template <typename scalar_t>
struct Pyramid {
  Image4<scalar_t> level[kMaxLevels];
};

template <typename scalar_t>
Image4<scalar_t> image4_of(const Tensor& tensor) {
  using value_t = std::remove_const_t<scalar_t>;
  Image4<scalar_t> image;
  if constexpr (std::is_const_v<scalar_t>) {
    image.data = static_cast<const value_t*>(tensor.const_data_ptr());
  } else {
    image.data = static_cast<value_t*>(tensor.mutable_data_ptr());
  }
  for (int64_t dim = 0; dim < 4; ++dim) {
    image.strides[dim] = tensor.stride(dim);
  }
  return image;
}

template <typename scalar_t>
Pyramid<scalar_t> pyramid_of(const std::vector<Tensor>& levels) {
  Pyramid<scalar_t> pyramid;
  for (size_t level = 0; level < levels.size(); ++level) {
    pyramid.level[level] = image4_of<scalar_t>(levels[level]);
  }
  return pyramid;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == 0, "dsg: no CUDA stream for device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

// The kernels stride over the grid, so a grid that is too small for the work only takes longer.
inline unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::min((threads + kThreads - 1) / kThreads, kMaxBlocks));
}

void launch_forward(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling, const Tensor& output);
void launch_backward_features(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const std::vector<Tensor>& grad_features);
void launch_backward_prob(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const Tensor& grad_prob);

}  // namespace dsg
