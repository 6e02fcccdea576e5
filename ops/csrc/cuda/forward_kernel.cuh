// SgRoIAlign on CUDA, forward, for every layout: one thread per element of the output, all levels in one launch.
#pragma once

#include "pyramid.cuh"

namespace dsg {
namespace {

// `channels_inner`: neighbouring threads take neighbouring channels, which lie side by side in channels-last
// features; else they take neighbouring bins, whose cells lie in the same rows of a plane.
template <typename scalar_t, bool channels_inner, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const Call<acc_t> call, const Pyramid<const scalar_t> pyramid, const Image4<scalar_t> output, int64_t total) {
  const int64_t bins = call.out_height * call.out_width;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = index / (bins * call.channels), rest = index % (bins * call.channels);
    const int64_t channel = channels_inner ? rest % call.channels : rest / bins;
    const int64_t bin = channels_inner ? rest / call.channels : rest % bins;
    const int64_t bin_y = bin / call.out_width, bin_x = bin % call.out_width;
    const Place<acc_t> place = place_roi(call, row);
    acc_t sum = acc_t(0);
    if (place.valid) {
      const Image4<const scalar_t>& level = pyramid.level[place.level];
      Tap<acc_t> y, x;
      for (int64_t point_y = bin_y * place.y.samples; point_y < (bin_y + 1) * place.y.samples; ++point_y) {
        if (!feature_tap(place.y, point_y, y)) {
          continue;
        }
        for (int64_t point_x = bin_x * place.x.samples; point_x < (bin_x + 1) * place.x.samples; ++point_x) {
          if (!feature_tap(place.x, point_x, x)) {
            continue;
          }
          const auto read = [&](int64_t cell_y, int64_t cell_x) {
            return static_cast<acc_t>(level.at(place.image, channel, cell_y, cell_x));
          };
          const acc_t top = read(y.low, x.low) * (acc_t(1) - x.fraction) + read(y.low, x.high) * x.fraction;
          const acc_t bottom = read(y.high, x.low) * (acc_t(1) - x.fraction) + read(y.high, x.high) * x.fraction;
          acc_t value = top * (acc_t(1) - y.fraction) + bottom * y.fraction;
          if (call.prob_height > 0) {
            value *= guidance(
                call, row, prob_tap<acc_t>(place.y.points, point_y, call.prob_height),
                prob_tap<acc_t>(place.x.points, point_x, call.prob_width));
          }
          sum += value;
        }
      }
      sum /= place.count();
    }
    output.at(row, channel, bin_y, bin_x) = static_cast<scalar_t>(sum);
  }
}

}  // namespace
}  // namespace dsg
