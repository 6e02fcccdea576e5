// The op for onnxruntime on the CPU: levels are put channels last, then each RoI is a weighted sum of cells.
#include <algorithm>

#include "../cpu/channel_math.h"
#include "../cpu/points.h"
#include "request.h"

namespace dsg {
namespace {

constexpr int64_t kRoisPerTask = 8;
constexpr int64_t kCellsPerTask = 256;

// [N, C, cells] -> [N, cells, C] in float.
template <typename scalar_t>
std::vector<float> channels_last(const Request& request, size_t level, const Parallel& parallel) {
  const int64_t cells = request.heights[level] * request.widths[level], channels = request.channels;
  const int64_t tasks = (cells + kCellsPerTask - 1) / kCellsPerTask;
  const scalar_t* source = static_cast<const scalar_t*>(request.features[level]);
  std::vector<float> target(request.images * cells * channels);
  for_each(parallel, request.images * tasks, [&](int64_t task) {
    const int64_t image = task / tasks, begin = task % tasks * kCellsPerTask;
    const int64_t end = std::min(begin + kCellsPerTask, cells);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const scalar_t* plane = source + (image * channels + channel) * cells;
      for (int64_t cell = begin; cell < end; ++cell) {
        target[(image * cells + cell) * channels + channel] = static_cast<float>(plane[cell]);
      }
    }
  });
  return target;
}

template <typename scalar_t>
void run(const Request& request, const Attributes& attributes, const Parallel& parallel) {
  const Call<float> call = call_of(request, attributes);
  std::vector<std::vector<float>> buffers;
  std::vector<Cells<float>> levels;
  for (size_t level = 0; level < request.features.size(); ++level) {
    buffers.push_back(channels_last<scalar_t>(request, level, parallel));
    const int64_t row = request.widths[level] * call.channels;
    levels.push_back({buffers.back().data(), request.heights[level] * row, row, call.channels});
  }
  const int64_t bins = call.out_height * call.out_width, channels = call.channels;
  scalar_t* target = static_cast<scalar_t*>(request.output);
  for_each(parallel, (call.rois + kRoisPerTask - 1) / kRoisPerTask, [&](int64_t task) {
    Points<float> points(call);
    std::vector<float*> rows;
    std::vector<float> weights, sums(bins * channels);
    for (int64_t row = task * kRoisPerTask; row < std::min((task + 1) * kRoisPerTask, call.rois); ++row) {
      scalar_t* pooled = target + row * channels * bins;  // [C, H, W]
      const Place<float> place = place_roi(call, row);
      if (!place.valid) {
        std::fill(pooled, pooled + channels * bins, scalar_t(0.0f));
        continue;
      }
      points.move_to(place, row);
      for (int64_t bin = 0; bin < bins; ++bin) {
        points.gather_bin(bin / call.out_width, bin % call.out_width, levels[place.level], 0, rows, weights);
        weighted_sum(
            rows.data(), weights.data(), static_cast<int64_t>(rows.size()), channels, sums.data() + bin * channels);
      }
      for (int64_t tile = 0; tile < channels; tile += kChannelTile) {
        const int64_t tile_end = std::min(tile + kChannelTile, channels);
        for (int64_t bin = 0; bin < bins; ++bin) {
          for (int64_t channel = tile; channel < tile_end; ++channel) {
            pooled[channel * bins + bin] = static_cast<scalar_t>(sums[bin * channels + channel]);
          }
        }
      }
    }
  });
}

}  // namespace

void run_on_cpu(const Request& request, const Attributes& attributes, const Parallel& parallel) {
  if (request.type == ScalarType::Half) {
    run<Half>(request, attributes, parallel);
  } else {
    run<float>(request, attributes, parallel);
  }
}

}  // namespace dsg
