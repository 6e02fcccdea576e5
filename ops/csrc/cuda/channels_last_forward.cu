// SgRoIAlign on CUDA for channels-last features, forward: 16 bytes of neighbouring channels at a time.
#include "channels_last.cuh"

namespace dsg {
namespace {

template <typename scalar_t>
constexpr int kTogether = 16 / sizeof(scalar_t);

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) forward_channels_last_kernel(
    const Call<float> call, const Pyramid<const scalar_t> pyramid, scalar_t* __restrict__ output) {
  constexpr int count = kTogether<scalar_t>;
  __shared__ BlockRoi roi;
  const bool guided = call.prob_height > 0;
  const int groups = static_cast<int>(call.channels) / count;
  const int out_width = static_cast<int>(call.out_width), bins = static_cast<int>(call.out_height) * out_width;
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    const bool valid = read_roi(call, row, guided, roi);
    const int samples = static_cast<int>(roi.place.y.samples);
    const Image4<const scalar_t>& level = pyramid.level[roi.place.level];
    const scalar_t* image = level.data + (valid ? roi.place.image * level.strides[0] : 0);
    const float share = 1.0f / roi.place.count();
    for (int item = threadIdx.x; item < bins * groups; item += kThreads) {
      const int group = item % groups, bin = item / groups;
      float sums[count] = {};
      if (valid) {
        const int first_y = bin / out_width * samples, first_x = bin % out_width * samples;
        for (int point_y = first_y; point_y < first_y + samples; ++point_y) {
          const PointTap y = roi.y[point_y];
          if (y.low < 0) {
            continue;
          }
          const scalar_t* low = image + y.low * level.strides[2] + group * count;
          const scalar_t* high = image + y.high * level.strides[2] + group * count;
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
    forward_channels_last_kernel<scalar_t><<<blocks_of_rois(call), kThreads, 0, current_stream(output)>>>(
        call, pyramid_of<const scalar_t>(features), static_cast<scalar_t*>(output.mutable_data_ptr()));
    check_launch("forward, channels last");
  });
  return true;
}

}  // namespace dsg
