// SgRoIAlign on CUDA for channels-last features, backward.
//
// The gradient of the features is added up with atomics in float32, once for each cell that a RoI reads, however many of
// its points read it. Its last bits depend on the order of the additions; the deterministic mode takes the kernel of
// sg_roi_align_backward.cu. The gradient of the map needs no atomics.
#include "channels_last.cuh"

namespace dsg {
namespace {

constexpr int kTogether = 4;  // channels of one addition: 16 bytes
constexpr int kMostCells = 128;  // cells that a RoI may span along an axis to be added up cell by cell

template <typename scalar_t>
constexpr int kRead = 16 / sizeof(scalar_t);  // channels of a thread

// Where gradients are added up: [N, Hf, Wf, C] of each level.
struct Sums {
  float* level[kMaxLevels];
};

// Of each cell along an axis, the first and the last bin that read it; first > last for none.
struct CellBins {
  short first[kMostCells], last[kMostCells];
};

template <int count>
__device__ __forceinline__ void add_pack(float* target, const float (&values)[count], float weight) {
#pragma unroll
  for (int i = 0; i < count; i += kTogether) {
#if __CUDA_ARCH__ >= 900
    atomicAdd(
        reinterpret_cast<float4*>(target + i),
        make_float4(values[i] * weight, values[i + 1] * weight, values[i + 2] * weight, values[i + 3] * weight));
#else
#pragma unroll
    for (int j = i; j < i + kTogether; ++j) {
      atomicAdd(target + j, values[j] * weight);
    }
#endif
  }
}

// The cells that the points of an axis read: `begin`, and how many there are; 0 for none.
__device__ __forceinline__ int cells_of(const PointTap* taps, int points, int& begin) {
  int last = -1;
  begin = 1 << 30;
  for (int point = 0; point < points; ++point) {
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

// All threads of the block call this, and read `bins` after the next barrier.
__device__ __forceinline__ void find_bins(
    const PointTap* taps, int points, int samples, int begin, int cells, CellBins& bins) {
  for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
    int first = points, last = -1;
    for (int point = 0; point < points; ++point) {
      if (taps[point].low == begin + cell || taps[point].high == begin + cell) {
        first = min(first, point);
        last = point;
      }
    }
    bins.first[cell] = static_cast<short>(first / samples);
    bins.last[cell] = static_cast<short>(last < 0 ? -1 : last / samples);
  }
}

// A block a RoI and a warp's width of channels, as in the forward pass.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) scatter_features_kernel(
    const Call<float> call, const scalar_t* __restrict__ grad_output, const Sums sums) {
  constexpr int count = kRead<scalar_t>;
  __shared__ BlockRoi roi;
  __shared__ CellBins bins_y, bins_x;
  const bool guided = call.prob_height > 0;
  const int channels = static_cast<int>(call.channels), groups = channels / count, lanes = min(groups, kWarp);
  const int group = blockIdx.y * lanes + threadIdx.x % lanes, at_once = kThreads / lanes;
  const int own = threadIdx.x / lanes;
  const bool works = group < groups && own < at_once;
  const int out_width = static_cast<int>(call.out_width), bins = static_cast<int>(call.out_height) * out_width;
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    if (!read_roi(call, row, guided, roi)) {
      continue;
    }
    const int samples = static_cast<int>(roi.place.y.samples);
    const int points_y = static_cast<int>(roi.place.y.points), points_x = static_cast<int>(roi.place.x.points);
    const int64_t width = call.width[roi.place.level];
    float* image = sums.level[roi.place.level] +
        roi.place.image * call.height[roi.place.level] * width * channels + group * count;
    const scalar_t* grads = grad_output + row * bins * channels + group * count;
    const float share = 1.0f / roi.place.count();
    int begin_y, begin_x;
    const int rows = cells_of(roi.y, points_y, begin_y), columns = cells_of(roi.x, points_x, begin_x);
    const int64_t cells = static_cast<int64_t>(rows) * columns;
    const auto guide_of = [&](int y, int x) { return guided ? share * roi.guidance[y * points_x + x] : share; };
    if (rows <= kMostCells && columns <= kMostCells && cells <= 4 * points_y * points_x) {
      find_bins(roi.y, points_y, samples, begin_y, rows, bins_y);
      find_bins(roi.x, points_x, samples, begin_x, columns, bins_x);
      __syncthreads();
      for (int cell = own; works && cell < cells; cell += at_once) {
        const int cell_y = cell / columns, cell_x = cell % columns;
        const int first_x = bins_x.first[cell_x], last_x = bins_x.last[cell_x];
        float total[count] = {};
        bool touched = false;
        for (int bin_y = bins_y.first[cell_y]; bin_y <= bins_y.last[cell_y]; ++bin_y) {
          for (int bin_x = first_x; bin_x <= last_x; ++bin_x) {
            float weight = 0.0f;
            for (int y = bin_y * samples; y < (bin_y + 1) * samples; ++y) {
              const float weight_y = weight_of(roi.y[y], begin_y + cell_y);
              for (int x = bin_x * samples; weight_y != 0.0f && x < (bin_x + 1) * samples; ++x) {
                weight += weight_y * weight_of(roi.x[x], begin_x + cell_x) * guide_of(y, x);
              }
            }
            if (weight != 0.0f) {
              float grad[count];
              load_pack(grads + (bin_y * out_width + bin_x) * channels, grad);
#pragma unroll
              for (int i = 0; i < count; ++i) {
                total[i] += weight * grad[i];
              }
              touched = true;
            }
          }
        }
        if (touched) {
          add_pack(image + ((begin_y + cell_y) * width + begin_x + cell_x) * channels, total, 1.0f);
        }
      }
      continue;
    }
    // So wide that its points hardly share cells.
    for (int point = own; works && point < points_y * points_x; point += at_once) {
      const int point_y = point / points_x, point_x = point % points_x;
      const PointTap y = roi.y[point_y], x = roi.x[point_x];
      if (y.low < 0 || x.low < 0) {
        continue;
      }
      const int bin = point_y / samples * out_width + point_x / samples;
      float grad[count];
      load_pack(grads + bin * channels, grad);
      const float weight = guide_of(point_y, point_x);
      const auto target = [&](int cell_y, int cell_x) { return image + (cell_y * width + cell_x) * channels; };
      add_pack(target(y.low, x.low), grad, weight * (1.0f - y.fraction) * (1.0f - x.fraction));
      add_pack(target(y.low, x.high), grad, weight * (1.0f - y.fraction) * x.fraction);
      add_pack(target(y.high, x.low), grad, weight * y.fraction * (1.0f - x.fraction));
      add_pack(target(y.high, x.high), grad, weight * y.fraction * x.fraction);
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
  if (is_dense_channels_last(grad_output)) {
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
  const int together = features[0].scalar_type() == ScalarType::Float ? kRead<float> : kRead<Half>;
  if (!is_channels_last_call(features, prob, sampling, together)) {
    return false;
  }
  const Tensor grads = with_channels_last(grad_output);
  std::vector<Tensor> buffers;
  Sums sums{};
  for (size_t level = 0; level < features.size(); ++level) {
    const Tensor& one = grad_features[level];
    if (one.scalar_type() == ScalarType::Float && is_dense_channels_last(one)) {
      buffers.push_back(one);
      torch::stable::zero_(buffers[level]);
    } else {
      const std::vector<int64_t> shape = {one.size(0), one.size(2), one.size(3), one.size(1)};
      const Tensor sum = torch::stable::new_zeros(one, shape, ScalarType::Float);
      buffers.push_back(torch::stable::permute(sum, {0, 3, 1, 2}));
    }
    sums.level[level] = static_cast<float*>(buffers.back().mutable_data_ptr());
  }
  dispatch_single(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<float>(features, rois, prob, sampling);
    const int64_t width = kRead<scalar_t> * kWarp;
    const dim3 blocks(blocks_of_rois(call), static_cast<unsigned>((call.channels + width - 1) / width));
    scatter_features_kernel<scalar_t><<<blocks, kThreads, 0, current_stream(grads)>>>(
        call, static_cast<const scalar_t*>(grads.const_data_ptr()), sums);
    check_launch("backward for features, channels last");
  });
  for (size_t level = 0; level < features.size(); ++level) {
    if (buffers[level].const_data_ptr() != grad_features[level].const_data_ptr()) {
      torch::stable::copy_(const_cast<Tensor&>(grad_features[level]), buffers[level]);
    }
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
