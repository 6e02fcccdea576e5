// SgRoIAlign on CUDA for channels-last features, forward: 16 bytes of neighbouring channels at a time.
#include "channels_last.cuh"

namespace dsg {
namespace {

template <typename scalar_t>
constexpr int kTogether = 16 / sizeof(scalar_t);

// Warps of a block: bins of the usual pools, 7 x 7 and 14 x 14, come out even.
constexpr int kForwardThreads = 7 * kWarp;

// One bin, two by two sampling points all inside the level, as nearly every bin is: all that it reads is asked for at
// once, and each channel of a corner costs one multiplication.
template <typename scalar_t, int count>
__device__ __forceinline__ void sum_four_points(
    const scalar_t* image, const Image4<const scalar_t>& level, const PointTap (&y)[2], const PointTap (&x)[2],
    const float (&weights)[2][2], float (&sums)[count]) {
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const PointTap& own_y = y[row / 2];
    const float share_y = row % 2 == 0 ? 1.0f - own_y.fraction : own_y.fraction;
    const scalar_t* line = image + (row % 2 == 0 ? own_y.low : own_y.high) * level.strides[2];
    float corners[4][count];
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      const PointTap& own_x = x[column / 2];
      load_pack(line + (column % 2 == 0 ? own_x.low : own_x.high) * level.strides[3], corners[column]);
    }
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      const PointTap& own_x = x[column / 2];
      const float share_x = column % 2 == 0 ? 1.0f - own_x.fraction : own_x.fraction;
      const float weight = weights[row / 2][column / 2] * share_y * share_x;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        sums[i] += weight * corners[column][i];
      }
    }
  }
}

// One bin, point by point; those outside the level add nothing.
template <typename scalar_t, int count>
__device__ __forceinline__ void sum_points(
    const scalar_t* image, const Image4<const scalar_t>& level, const BlockRoi& roi, int first_y, int first_x,
    int samples, bool guided, float (&sums)[count]) {
  for (int point_y = first_y; point_y < first_y + samples; ++point_y) {
    const PointTap y = roi.y[point_y];
    if (y.low < 0) {
      continue;
    }
    const scalar_t* low = image + y.low * level.strides[2];
    const scalar_t* high = image + y.high * level.strides[2];
    for (int point_x = first_x; point_x < first_x + samples; ++point_x) {
      const PointTap x = roi.x[point_x];
      if (x.low < 0) {
        continue;
      }
      const float weight = guided ? roi.guidance[point_y * static_cast<int>(roi.place.x.points) + point_x] : 1.0f;
      float corners[4][count];
      load_pack(low + x.low * level.strides[3], corners[0]);
      load_pack(low + x.high * level.strides[3], corners[1]);
      load_pack(high + x.low * level.strides[3], corners[2]);
      load_pack(high + x.high * level.strides[3], corners[3]);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float top = corners[0][i] * (1.0f - x.fraction) + corners[1][i] * x.fraction;
        const float bottom = corners[2][i] * (1.0f - x.fraction) + corners[3][i] * x.fraction;
        sums[i] += weight * (top * (1.0f - y.fraction) + bottom * y.fraction);
      }
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kForwardThreads, 4) forward_channels_last_kernel(
    const Call<float> call, const Pyramid<const scalar_t> pyramid, scalar_t* __restrict__ output) {
  constexpr int count = kTogether<scalar_t>;
  __shared__ BlockRoi roi;
  const bool guided = call.prob_height > 0;
  const int groups = static_cast<int>(call.channels) / count;
  const int out_width = static_cast<int>(call.out_width), bins = static_cast<int>(call.out_height) * out_width;
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    const bool valid = read_roi(call, row, guided, roi);
    const int samples = static_cast<int>(roi.place.y.samples), points_x = static_cast<int>(roi.place.x.points);
    const Image4<const scalar_t> level = pyramid.level[roi.place.level];
    const scalar_t* image = level.data + (valid ? roi.place.image * level.strides[0] : 0);
    const float share = 1.0f / roi.place.count();
    for (int item = threadIdx.x; item < bins * groups; item += kForwardThreads) {
      const int group = item % groups, bin = item / groups;
      float sums[count] = {};
      if (valid) {
        const int first_y = bin / out_width * samples, first_x = bin % out_width * samples;
        const scalar_t* channels = image + group * count;
        bool inside = sizeof(scalar_t) == 2 && samples == 2;  // float32 has no registers to spare for it
        if (inside) {
          const PointTap y[2] = {roi.y[first_y], roi.y[first_y + 1]}, x[2] = {roi.x[first_x], roi.x[first_x + 1]};
          inside = y[0].low >= 0 && y[1].low >= 0 && x[0].low >= 0 && x[1].low >= 0;
          if (inside) {
            const float* guide = roi.guidance + first_y * points_x + first_x;
            float weights[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
            if (guided) {
              weights[0][0] = guide[0], weights[0][1] = guide[1];
              weights[1][0] = guide[points_x], weights[1][1] = guide[points_x + 1];
            }
            sum_four_points<scalar_t, count>(channels, level, y, x, weights, sums);
          }
        }
        if (!inside) {
          sum_points<scalar_t, count>(channels, level, roi, first_y, first_x, samples, guided, sums);
        }
      }
      Pack<scalar_t, count> pack;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        pack.values[i] = static_cast<scalar_t>(sums[i] * share);
      }
      scalar_t* target = output + (row * bins + bin) * call.channels + group * count;
      *reinterpret_cast<Pack<scalar_t, count>*>(target) = pack;
    }
  }
}

}  // namespace

bool launch_forward_channels_last(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling, const Tensor& output) {
  const int together = features[0].scalar_type() == ScalarType::Float ? 4 : 8;
  if (!is_channels_last_call(features, prob, sampling, together)) {
    return false;
  }
  dispatch_single(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<float>(features, rois, prob, sampling);
    forward_channels_last_kernel<scalar_t><<<blocks_of_rois(call), kForwardThreads, 0, current_stream(output)>>>(
        call, pyramid_of<const scalar_t>(features), static_cast<scalar_t*>(output.mutable_data_ptr()));
    check_launch("forward, channels last");
  });
  return true;
}

}  // namespace dsg
