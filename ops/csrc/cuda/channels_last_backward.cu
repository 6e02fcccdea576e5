// SgRoIAlign on CUDA for channels-last features, backward.
//
// The gradient of the features is added up with atomics in float32, once for each cell that a bin reads, not once for
// each of its points: with two points a side some 6 to 12 cells in place of 16. Its last bits depend on the order of
// the additions; the deterministic mode takes the kernel of sg_roi_align_backward.cu. The gradient of the map needs no
// atomics.
#include "channels_last.cuh"

namespace dsg {
namespace {

constexpr int kTogether = 4;  // channels of a thread: one 16-byte addition
constexpr int kReach = 4;  // cells along an axis that the points of a bin may span to be added up first

// Where gradients are added up: [N, Hf, Wf, C] of each level.
struct Sums {
  float* level[kMaxLevels];
};

__device__ __forceinline__ void add_pack(float* target, const float (&values)[kTogether], float weight) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(
      reinterpret_cast<float4*>(target),
      make_float4(values[0] * weight, values[1] * weight, values[2] * weight, values[3] * weight));
#else
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    atomicAdd(target + i, values[i] * weight);
  }
#endif
}

// The cells that the points [first, first + samples) of an axis read: `begin`, and how many there are; 0 for none.
__device__ __forceinline__ int cells_of(const PointTap* taps, int first, int samples, int& begin) {
  int last = -1;
  begin = 1 << 30;
  for (int point = first; point < first + samples; ++point) {
    if (taps[point].low >= 0) {
      begin = min(begin, taps[point].low);
      last = max(last, taps[point].high);
    }
  }
  return last < 0 ? 0 : last - begin + 1;
}

__device__ __forceinline__ float weight_of(const PointTap& tap, int cell) {
  return (tap.low == cell ? 1.0f - tap.fraction : 0.0f) + (tap.high == cell ? tap.fraction : 0.0f);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) scatter_features_kernel(
    const Call<float> call, const scalar_t* __restrict__ grad_output, const Sums sums) {
  __shared__ BlockRoi roi;
  const bool guided = call.prob_height > 0;
  const int channels = static_cast<int>(call.channels), groups = channels / kTogether;
  const int out_width = static_cast<int>(call.out_width), bins = static_cast<int>(call.out_height) * out_width;
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    if (!read_roi(call, row, guided, roi)) {
      continue;
    }
    const int samples = static_cast<int>(roi.place.y.samples), points_x = static_cast<int>(roi.place.x.points);
    const int64_t width = call.width[roi.place.level];
    float* image = sums.level[roi.place.level] + roi.place.image * call.height[roi.place.level] * width * channels;
    const float share = 1.0f / roi.place.count();
    for (int item = threadIdx.x; item < bins * groups; item += kThreads) {
      const int group = item % groups, bin = item / groups;
      const int first_y = bin / out_width * samples, first_x = bin % out_width * samples;
      int begin_y, begin_x;
      const int rows = cells_of(roi.y, first_y, samples, begin_y), columns = cells_of(roi.x, first_x, samples, begin_x);
      if (rows == 0 || columns == 0) {
        continue;
      }
      float grad[kTogether];
      load_pack(grad_output + (row * bins + bin) * channels + group * kTogether, grad);
      float* target = image + group * kTogether;
      const auto cell = [&](int y, int x) { return target + (y * width + x) * channels; };
      if (rows <= kReach && columns <= kReach) {
        float weights[kReach][kReach] = {};
        for (int point_y = first_y; point_y < first_y + samples; ++point_y) {
          const PointTap y = roi.y[point_y];
          for (int point_x = first_x; y.low >= 0 && point_x < first_x + samples; ++point_x) {
            const PointTap x = roi.x[point_x];
            if (x.low < 0) {
              continue;
            }
            const float weight = guided ? share * roi.guidance[point_y * points_x + point_x] : share;
#pragma unroll
            for (int i = 0; i < kReach; ++i) {
              const float weight_y = weight * weight_of(y, begin_y + i);
#pragma unroll
              for (int j = 0; j < kReach; ++j) {
                weights[i][j] += weight_y * weight_of(x, begin_x + j);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kReach; ++i) {
#pragma unroll
          for (int j = 0; j < kReach; ++j) {
            if (weights[i][j] != 0.0f) {
              add_pack(cell(begin_y + i, begin_x + j), grad, weights[i][j]);
            }
          }
        }
        continue;
      }
      for (int point_y = first_y; point_y < first_y + samples; ++point_y) {
        const PointTap y = roi.y[point_y];
        for (int point_x = first_x; y.low >= 0 && point_x < first_x + samples; ++point_x) {
          const PointTap x = roi.x[point_x];
          if (x.low < 0) {
            continue;
          }
          const float weight = guided ? share * roi.guidance[point_y * points_x + point_x] : share;
          add_pack(cell(y.low, x.low), grad, weight * (1.0f - y.fraction) * (1.0f - x.fraction));
          add_pack(cell(y.low, x.high), grad, weight * (1.0f - y.fraction) * x.fraction);
          add_pack(cell(y.high, x.low), grad, weight * y.fraction * (1.0f - x.fraction));
          add_pack(cell(y.high, x.high), grad, weight * y.fraction * x.fraction);
        }
      }
    }
  }
}

// A block a RoI: first each point's product of feature and gradient, a warp a point, then each cell of the map gathers
// from the points that read it.
template <typename scalar_t, typename prob_t>
__global__ void __launch_bounds__(kThreads) gather_prob_kernel(
    const Call<float> call, const scalar_t* __restrict__ grad_output, const Pyramid<const scalar_t> pyramid,
    prob_t* __restrict__ grad_prob, int64_t stride_row, int64_t stride_y, int64_t stride_x) {
  __shared__ BlockRoi roi;
  __shared__ float products[kMostGuided];
  const int channels = static_cast<int>(call.channels), lane = threadIdx.x % kWarp;
  const int out_width = static_cast<int>(call.out_width), bins = static_cast<int>(call.out_height) * out_width;
  const int map_width = static_cast<int>(call.prob_width), cells = static_cast<int>(call.prob_height) * map_width;
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    const bool valid = read_roi(call, row, false, roi);
    const int samples = static_cast<int>(roi.place.y.samples), points_x = static_cast<int>(roi.place.x.points);
    const int points_y = static_cast<int>(roi.place.y.points);
    if (valid) {
      const Image4<const scalar_t>& level = pyramid.level[roi.place.level];
      const scalar_t* image = level.data + roi.place.image * level.strides[0];
      for (int point = threadIdx.x / kWarp; point < points_y * points_x; point += kThreads / kWarp) {
        const PointTap y = roi.y[point / points_x], x = roi.x[point % points_x];
        float product = 0.0f;
        if (y.low >= 0 && x.low >= 0) {
          const int bin = point / points_x / samples * out_width + point % points_x / samples;
          const scalar_t* grads = grad_output + (row * bins + bin) * channels;
          const scalar_t* low = image + y.low * level.strides[2];
          const scalar_t* high = image + y.high * level.strides[2];
          for (int channel = lane * kTogether; channel < channels; channel += kWarp * kTogether) {
            float grad[kTogether], corners[4][kTogether];
            load_pack(grads + channel, grad);
            load_pack(low + x.low * level.strides[3] + channel, corners[0]);
            load_pack(low + x.high * level.strides[3] + channel, corners[1]);
            load_pack(high + x.low * level.strides[3] + channel, corners[2]);
            load_pack(high + x.high * level.strides[3] + channel, corners[3]);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              const float top = corners[0][i] * (1.0f - x.fraction) + corners[1][i] * x.fraction;
              const float bottom = corners[2][i] * (1.0f - x.fraction) + corners[3][i] * x.fraction;
              product += grad[i] * (top * (1.0f - y.fraction) + bottom * y.fraction);
            }
          }
        }
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
          product += __shfl_xor_sync(0xffffffffu, product, offset);
        }
        if (lane == 0) {
          products[point] = product;
        }
      }
    }
    __syncthreads();
    const float share = 1.0f / roi.place.count();
    for (int place = threadIdx.x; place < cells; place += kThreads) {
      const int map_y = place / map_width, map_x = place % map_width;
      float sum = 0.0f;
      if (valid) {
        // The map's own cells, seen from the points: place in the map = start + (point + 0.5) * step.
        const auto map_axis = [](int64_t points, int64_t map_cells) {
          return Axis<float>{-0.5f, static_cast<float>(map_cells) / static_cast<float>(points), map_cells, 1, points};
        };
        int64_t begin_y, end_y, begin_x, end_x;
        touching_points(map_axis(points_y, call.prob_height), map_y, map_y, begin_y, end_y);
        touching_points(map_axis(points_x, call.prob_width), map_x, map_x, begin_x, end_x);
        for (int64_t point_y = begin_y; point_y < end_y; ++point_y) {
          const float weight_y = weight_of(prob_tap<float>(points_y, point_y, call.prob_height), map_y);
          for (int64_t point_x = begin_x; weight_y != 0.0f && point_x < end_x; ++point_x) {
            const float weight_x = weight_of(prob_tap<float>(points_x, point_x, call.prob_width), map_x);
            if (weight_x != 0.0f) {
              sum += weight_y * weight_x * products[point_y * points_x + point_x];
            }
          }
        }
      }
      grad_prob[row * stride_row + map_y * stride_y + map_x * stride_x] = static_cast<prob_t>(sum * share);
    }
  }
}

// grad_output as [K, H, W, C] in memory; a copy where it lies otherwise.
Tensor with_channels_last(const Tensor& grad_output) {
  const int64_t channels = grad_output.size(1), width = grad_output.size(3), height = grad_output.size(2);
  const bool as_wanted = grad_output.stride(1) == 1 && grad_output.stride(3) == channels &&
      grad_output.stride(2) == width * channels && grad_output.stride(0) == height * width * channels &&
      reinterpret_cast<uintptr_t>(grad_output.const_data_ptr()) % 16 == 0;
  if (as_wanted) {
    return grad_output;
  }
  const Tensor copy = torch::stable::new_empty(grad_output, {grad_output.size(0), height, width, channels});
  const Tensor view = torch::stable::permute(copy, {0, 3, 1, 2});
  torch::stable::copy_(const_cast<Tensor&>(view), grad_output);
  return view;
}

}  // namespace

bool launch_backward_features_channels_last(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const std::vector<Tensor>& grad_features) {
  if (!is_channels_last_call(features, prob, sampling, kTogether)) {
    return false;
  }
  const Tensor grads = with_channels_last(grad_output);
  std::vector<Tensor> buffers;
  Sums sums{};
  for (size_t level = 0; level < features.size(); ++level) {
    const Tensor& one = features[level];
    buffers.push_back(torch::stable::new_zeros(one, {one.size(0), one.size(2), one.size(3), one.size(1)}, ScalarType::Float));
    sums.level[level] = static_cast<float*>(buffers.back().mutable_data_ptr());
  }
  dispatch_single(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<float>(features, rois, prob, sampling);
    scatter_features_kernel<scalar_t><<<blocks_of_rois(call), kThreads, 0, current_stream(grads)>>>(
        call, static_cast<const scalar_t*>(grads.const_data_ptr()), sums);
    check_launch("backward for features, channels last");
  });
  for (size_t level = 0; level < features.size(); ++level) {
    torch::stable::copy_(
        const_cast<Tensor&>(grad_features[level]), torch::stable::permute(buffers[level], {0, 3, 1, 2}));
  }
  return true;
}

bool launch_backward_prob_channels_last(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const Tensor& grad_prob) {
  if (!is_channels_last_call(features, prob, sampling, kTogether)) {
    return false;
  }
  const Tensor grads = with_channels_last(grad_output);
  dispatch_single(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<float>(features, rois, prob, sampling);
    dispatch_floating(grad_prob.scalar_type(), [&](auto prob_zero) {
      using prob_t = decltype(prob_zero);
      gather_prob_kernel<scalar_t, prob_t><<<blocks_of_rois(call), kThreads, 0, current_stream(grads)>>>(
          call, static_cast<const scalar_t*>(grads.const_data_ptr()), pyramid_of<const scalar_t>(features),
          static_cast<prob_t*>(grad_prob.mutable_data_ptr()), grad_prob.stride(0), grad_prob.stride(1),
          grad_prob.stride(2));
      check_launch("backward for prob, channels last");
    });
  });
  return true;
}

}  // namespace dsg
