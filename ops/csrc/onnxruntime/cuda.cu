// The op for onnxruntime on CUDA: planes of channels, as onnxruntime lays features out.
#include "../cuda/channels_last.cuh"
#include "../cuda/forward_kernel.cuh"
#include "request.h"

namespace dsg {
namespace {

constexpr int kChannelsPerBlock = 64;

// A block a RoI and run of channels: sampling points worked out once, neighbouring threads on neighbouring bins.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) planar_kernel(
    const Call<float> call, const Pyramid<const scalar_t> pyramid, scalar_t* __restrict__ output) {
  __shared__ BlockRoi roi;
  const bool guided = call.prob_height > 0;
  const int out_width = static_cast<int>(call.out_width), bins = static_cast<int>(call.out_height) * out_width;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kChannelsPerBlock;
  const int channels = static_cast<int>(min(static_cast<int64_t>(kChannelsPerBlock), call.channels - first));
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    const bool valid = read_roi(call, row, guided, roi);
    const int samples = static_cast<int>(roi.place.y.samples);
    const Image4<const scalar_t>& level = pyramid.level[roi.place.level];
    const float share = 1.0f / roi.place.count();
    scalar_t* pooled = output + (row * call.channels + first) * bins;
    for (int item = threadIdx.x; item < channels * bins; item += kThreads) {
      float sum = 0.0f;
      if (valid) {
        const int channel = item / bins, bin = item % bins;
        const scalar_t* plane = &level.at(roi.place.image, first + channel, 0, 0);
        const int first_y = bin / out_width * samples, first_x = bin % out_width * samples;
        for (int point_y = first_y; point_y < first_y + samples; ++point_y) {
          const PointTap y = roi.y[point_y];
          if (y.low < 0) {
            continue;
          }
          const scalar_t* low = plane + y.low * level.strides[2];
          const scalar_t* high = plane + y.high * level.strides[2];
          for (int point_x = first_x; point_x < first_x + samples; ++point_x) {
            const PointTap x = roi.x[point_x];
            if (x.low < 0) {
              continue;
            }
            const float top =
                static_cast<float>(low[x.low]) * (1.0f - x.fraction) + static_cast<float>(low[x.high]) * x.fraction;
            const float bottom =
                static_cast<float>(high[x.low]) * (1.0f - x.fraction) + static_cast<float>(high[x.high]) * x.fraction;
            const float weight = guided ? roi.guidance[point_y * static_cast<int>(roi.place.x.points) + point_x] : 1.0f;
            sum += weight * (top * (1.0f - y.fraction) + bottom * y.fraction);
          }
        }
      }
      pooled[item] = static_cast<scalar_t>(sum * share);
    }
  }
}

template <typename scalar_t>
Pyramid<const scalar_t> pyramid_of_request(const Request& request) {
  Pyramid<const scalar_t> pyramid;
  for (size_t level = 0; level < request.features.size(); ++level) {
    const int64_t width = request.widths[level], plane = request.heights[level] * width;
    pyramid.level[level] = {
        static_cast<const scalar_t*>(request.features[level]), {request.channels * plane, plane, width, 1}};
  }
  return pyramid;
}

template <typename scalar_t>
void launch(const Request& request, const Attributes& attributes, cudaStream_t stream) {
  const auto call = call_of(request, attributes);
  const auto pyramid = pyramid_of_request<scalar_t>(request);
  scalar_t* output = static_cast<scalar_t*>(request.output);
  const int64_t samples = attributes.sampling_ratio;
  const int64_t points_y = call.out_height * samples, points_x = call.out_width * samples;
  const bool has_room = samples > 0 && points_y <= kMostPoints && points_x <= kMostPoints &&
      (call.prob_height == 0 || points_y * points_x <= kMostGuided);
  const int64_t channel_blocks = (call.channels + kChannelsPerBlock - 1) / kChannelsPerBlock;
  if (has_room && channel_blocks <= 65535) {
    const dim3 grid(blocks_of_rois(call), static_cast<unsigned>(channel_blocks));
    planar_kernel<scalar_t><<<grid, kThreads, 0, stream>>>(call, pyramid, output);
    return;
  }
  const int64_t bins = call.out_height * call.out_width, total = call.rois * call.channels * bins;
  const Image4<scalar_t> target{output, {call.channels * bins, bins, call.out_width, 1}};
  forward_kernel<scalar_t, false><<<blocks_for(total), kThreads, 0, stream>>>(call, pyramid, target, total);
}

}  // namespace

const char* run_on_cuda(const Request& request, const Attributes& attributes, void* stream) {
  if (request.type == ScalarType::Half) {
    launch<Half>(request, attributes, static_cast<cudaStream_t>(stream));
  } else {
    launch<float>(request, attributes, static_cast<cudaStream_t>(stream));
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dsg
