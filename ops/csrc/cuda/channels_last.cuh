// What the kernels for channels-last features share: a block a RoI, its sampling points worked out once for all
// channels, neighbouring channels read and written together.
#pragma once

#include "pyramid.cuh"

namespace dsg {

constexpr int kMostPoints = 64;  // sampling points of a RoI along an axis that these kernels have room for
constexpr int kMostGuided = 1024;  // and in all, where a map weighs them

template <typename scalar_t, int count>
struct alignas(sizeof(scalar_t) * count) Pack {
  scalar_t values[count];
};

template <typename scalar_t, int count>
__device__ __forceinline__ void load_pack(const scalar_t* source, float (&values)[count]) {
  const auto pack = *reinterpret_cast<const Pack<scalar_t, count>*>(source);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = static_cast<float>(pack.values[i]);
  }
}

// One sampling row or column. Offsets are in elements of the level.
struct PointTap {
  int low, high;  // cells; -1 where the point lies outside and adds nothing
  float fraction;  // weight of `high`
};

// A RoI as a block sees it, in shared memory.
struct BlockRoi {
  Place<float> place;
  PointTap y[kMostPoints], x[kMostPoints];
  float guidance[kMostGuided];  // 1 + p of each point, row by row; unused without a map
};

__device__ __forceinline__ PointTap point_tap(const Axis<float>& axis, int64_t point) {
  Tap<float> tap;
  if (!feature_tap(axis, point, tap)) {
    return {-1, -1, 0.0f};
  }
  return {static_cast<int>(tap.low), static_cast<int>(tap.high), tap.fraction};
}

// All threads of the block call this; afterwards all may read `roi`. Returns whether the RoI is one.
__device__ __forceinline__ bool read_roi(const Call<float>& call, int64_t row, bool guided, BlockRoi& roi) {
  __syncthreads();  // the last RoI of this block is no longer needed
  if (threadIdx.x == 0) {
    roi.place = place_roi(call, row);
  }
  __syncthreads();
  if (!roi.place.valid) {
    return false;
  }
  const int points_y = static_cast<int>(roi.place.y.points), points_x = static_cast<int>(roi.place.x.points);
  for (int point = threadIdx.x; point < points_y + points_x; point += blockDim.x) {
    if (point < points_y) {
      roi.y[point] = point_tap(roi.place.y, point);
    } else {
      roi.x[point - points_y] = point_tap(roi.place.x, point - points_y);
    }
  }
  if (guided) {
    for (int point = threadIdx.x; point < points_y * points_x; point += blockDim.x) {
      roi.guidance[point] = guidance(
          call, row, prob_tap<float>(points_y, point / points_x, call.prob_height),
          prob_tap<float>(points_x, point % points_x, call.prob_width));
    }
  }
  __syncthreads();
  return true;
}

// Whether these kernels can take a call; `channels`: how many of them are read together.
inline bool is_channels_last_call(
    const std::vector<Tensor>& features, const std::optional<Tensor>& prob, const Sampling& sampling, int channels) {
  const ScalarType type = features[0].scalar_type();
  if (type == ScalarType::Double || sampling.sampling_ratio <= 0 || features[0].size(1) % channels != 0) {
    return false;
  }
  const int64_t points_y = sampling.out_height * sampling.sampling_ratio;
  const int64_t points_x = sampling.out_width * sampling.sampling_ratio;
  if (points_y > kMostPoints || points_x > kMostPoints || (prob.has_value() && points_y * points_x > kMostGuided)) {
    return false;
  }
  for (const Tensor& level : features) {
    if (level.stride(1) != 1 || reinterpret_cast<uintptr_t>(level.const_data_ptr()) % 16 != 0) {
      return false;
    }
    for (int dim : {0, 2, 3}) {
      if (level.stride(dim) % channels != 0) {
        return false;
      }
    }
    // Places within a picture are int.
    const int64_t elements = level.stride(2) * level.size(2);
    if (level.size(2) * level.size(3) == 0 || elements != static_cast<int>(elements)) {
      return false;
    }
  }
  return true;
}

// Whether a tensor [B, C, H, W] lies channels-last without gaps, where packs of 16 bytes may begin. Along an axis of one
// element a stride means nothing.
inline bool is_dense_channels_last(const Tensor& one) {
  int64_t step = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (one.size(dim) != 1 && one.stride(dim) != step) {
      return false;
    }
    step *= one.size(dim);
  }
  return reinterpret_cast<uintptr_t>(one.const_data_ptr()) % 16 == 0;
}

// Calls `function` with a value of the C++ type that `type` names; float64 goes another way.
template <typename function_t>
void dispatch_single(ScalarType type, const function_t& function) {
  if (type == ScalarType::Half) {
    function(Half{});
  } else if (type == ScalarType::BFloat16) {
    function(BFloat16{});
  } else {
    function(float{});
  }
}

inline unsigned blocks_of_rois(const Call<float>& call) {
  return static_cast<unsigned>(std::min(call.rois, kMaxBlocks));
}

// Each says whether it took the call.
bool launch_forward_channels_last(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling, const Tensor& output);
bool launch_backward_features_channels_last(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const std::vector<Tensor>& grad_features);
bool launch_backward_prob_channels_last(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const Tensor& grad_prob);

}  // namespace dsg
