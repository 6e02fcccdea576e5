// SgRoIAlign on CUDA, backward: every gradient is gathered by the one warp that owns it, in a fixed order.
//
// No atomics: the result is the same in every run, low precisions are rounded once, and nothing is filled with zeros
// or copied afterwards. What the deterministic mode runs, and what takes the layouts and samplings that the kernels of
// channels_last_backward.cu do not.
#include "pyramid.cuh"

namespace dsg {
namespace {

// A block owns a tile of cells of one level and image: a warp per row, a lane per channel.
constexpr int kTileHeight = kThreads / kWarp;
constexpr int kTileWidth = 4;
constexpr int kChannelsPerLane = 2;
constexpr int kChannelsPerBlock = kWarp * kChannelsPerLane;

struct Tiles {
  int64_t begin[kMaxLevels + 1];  // first tile of each level; the last entry is the number of tiles
};

template <typename acc_t>
struct ListedRoi {
  int64_t row;
  Place<acc_t> place;
};

// The RoIs of one round that reach the tile, in their order. Returns how many there are.
template <typename acc_t>
__device__ int list_rois(
    const Call<acc_t>& call, int64_t first_row, int level, int64_t image, int64_t tile_y, int64_t tile_x,
    ListedRoi<acc_t>* list, int* warp_counts) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = first_row + threadIdx.x;
  Place<acc_t> place{};
  bool reaches = false;
  if (row < call.rois) {
    place = place_roi(call, row);
    if (place.valid && place.level == level && place.image == image) {
      int64_t begin_y, end_y, begin_x, end_x;
      touching_points(place.y, tile_y, tile_y + kTileHeight - 1, begin_y, end_y);
      touching_points(place.x, tile_x, tile_x + kTileWidth - 1, begin_x, end_x);
      reaches = begin_y < end_y && begin_x < end_x;
    }
  }
  const unsigned votes = __ballot_sync(0xffffffffu, reaches);
  if (lane == 0) {
    warp_counts[warp] = __popc(votes);
  }
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), total = 0;
  for (int other = 0; other < kThreads / kWarp; ++other) {
    before += other < warp ? warp_counts[other] : 0;
    total += warp_counts[other];
  }
  if (reaches) {
    list[before] = {row, place};
  }
  __syncthreads();
  return total;
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads) backward_features_kernel(
    const Call<acc_t> call, const Tiles tiles, const Image4<const scalar_t> grad_output,
    const Pyramid<scalar_t> grad_features) {
  __shared__ ListedRoi<acc_t> list[kThreads];
  __shared__ int warp_counts[kThreads / kWarp];
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChannelsPerBlock + threadIdx.x % kWarp;
  for (int64_t tile = blockIdx.x; tile < tiles.begin[call.levels]; tile += gridDim.x) {
    int level = 0;
    while (tile >= tiles.begin[level + 1]) {
      ++level;
    }
    const int64_t columns = (call.width[level] + kTileWidth - 1) / kTileWidth;
    const int64_t lines = (call.height[level] + kTileHeight - 1) / kTileHeight;
    const int64_t local = tile - tiles.begin[level];
    const int64_t image = local / (lines * columns);
    const int64_t tile_y = local / columns % lines * kTileHeight, tile_x = local % columns * kTileWidth;
    const int64_t y = tile_y + threadIdx.x / kWarp;
    acc_t sums[kTileWidth][kChannelsPerLane] = {};
    for (int64_t first_row = 0; first_row < call.rois; first_row += kThreads) {
      const int count = list_rois(call, first_row, level, image, tile_y, tile_x, list, warp_counts);
      for (int item = 0; item < count && y < call.height[level]; ++item) {
        const int64_t row = list[item].row;
        const Place<acc_t>& place = list[item].place;
        int64_t begin_y, end_y, begin_x, end_x;
        touching_points(place.y, y, y, begin_y, end_y);
        touching_points(place.x, tile_x, tile_x + kTileWidth - 1, begin_x, end_x);
        for (int64_t point_y = begin_y; point_y < end_y; ++point_y) {
          Tap<acc_t> tap_y;
          if (!feature_tap(place.y, point_y, tap_y) || (tap_y.low != y && tap_y.high != y)) {
            continue;
          }
          const acc_t weight_y = weight_of(tap_y, y) / place.count();
          for (int64_t point_x = begin_x; point_x < end_x; ++point_x) {
            Tap<acc_t> tap_x;
            if (!feature_tap(place.x, point_x, tap_x) || tap_x.high < tile_x || tap_x.low >= tile_x + kTileWidth) {
              continue;
            }
            acc_t weight = weight_y;
            if (call.prob_height > 0) {
              weight *= guidance(
                  call, row, prob_tap<acc_t>(place.y.points, point_y, call.prob_height),
                  prob_tap<acc_t>(place.x.points, point_x, call.prob_width));
            }
            acc_t weights[kTileWidth];
#pragma unroll
            for (int cell = 0; cell < kTileWidth; ++cell) {
              weights[cell] = weight * weight_of(tap_x, tile_x + cell);
            }
#pragma unroll
            for (int step = 0; step < kChannelsPerLane; ++step) {
              const int64_t channel = first_channel + step * kWarp;
              if (channel < call.channels) {
                const acc_t grad = static_cast<acc_t>(
                    grad_output.at(row, channel, point_y / place.y.samples, point_x / place.x.samples));
#pragma unroll
                for (int cell = 0; cell < kTileWidth; ++cell) {
                  // Skipped, not multiplied by 0: an infinite gradient stays in the cells it belongs to.
                  if (tap_x.low == tile_x + cell || tap_x.high == tile_x + cell) {
                    sums[cell][step] += weights[cell] * grad;
                  }
                }
              }
            }
          }
        }
      }
      __syncthreads();  // the next round overwrites the list
    }
#pragma unroll
    for (int cell = 0; cell < kTileWidth; ++cell) {
#pragma unroll
      for (int step = 0; step < kChannelsPerLane; ++step) {
        const int64_t channel = first_channel + step * kWarp, x = tile_x + cell;
        if (y < call.height[level] && x < call.width[level] && channel < call.channels) {
          grad_features.level[level].at(image, channel, y, x) = static_cast<scalar_t>(sums[cell][step]);
        }
      }
    }
  }
}

// A warp owns one cell of one map: its lanes share the channels of the points that read the cell.
template <typename scalar_t, typename prob_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads) backward_prob_kernel(
    const Call<acc_t> call, const Image4<const scalar_t> grad_output, const Pyramid<const scalar_t> pyramid,
    prob_t* __restrict__ grad_prob, int64_t stride_row, int64_t stride_y, int64_t stride_x) {
  const int64_t cells = call.prob_height * call.prob_width, warps = call.rois * cells;
  const int lane = threadIdx.x % kWarp;
  for (int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; index < warps;
       index += static_cast<int64_t>(gridDim.x) * kThreads / kWarp) {
    const int64_t row = index / cells;
    const int64_t prob_y = index % cells / call.prob_width, prob_x = index % call.prob_width;
    const Place<acc_t> place = place_roi(call, row);
    acc_t sum = acc_t(0);
    if (place.valid && place.y.points > 0 && place.x.points > 0) {
      const Image4<const scalar_t>& level = pyramid.level[place.level];
      // The map's own cells, seen from the points: place in the map = start + (point + 0.5) * step.
      const auto map_axis = [](int64_t points, int64_t map_cells) {
        return Axis<acc_t>{
            acc_t(-0.5), static_cast<acc_t>(map_cells) / static_cast<acc_t>(points), map_cells, 1, points};
      };
      int64_t begin_y, end_y, begin_x, end_x;
      touching_points(map_axis(place.y.points, call.prob_height), prob_y, prob_y, begin_y, end_y);
      touching_points(map_axis(place.x.points, call.prob_width), prob_x, prob_x, begin_x, end_x);
      Tap<acc_t> y, x;
      for (int64_t point_y = begin_y; point_y < end_y; ++point_y) {
        const Tap<acc_t> map_y = prob_tap<acc_t>(place.y.points, point_y, call.prob_height);
        if ((map_y.low != prob_y && map_y.high != prob_y) || !feature_tap(place.y, point_y, y)) {
          continue;
        }
        for (int64_t point_x = begin_x; point_x < end_x; ++point_x) {
          const Tap<acc_t> map_x = prob_tap<acc_t>(place.x.points, point_x, call.prob_width);
          if ((map_x.low != prob_x && map_x.high != prob_x) || !feature_tap(place.x, point_x, x)) {
            continue;
          }
          acc_t product = acc_t(0);
          for (int64_t channel = lane; channel < call.channels; channel += kWarp) {
            const auto read = [&](int64_t cell_y, int64_t cell_x) {
              return static_cast<acc_t>(level.at(place.image, channel, cell_y, cell_x));
            };
            const acc_t top = read(y.low, x.low) * (acc_t(1) - x.fraction) + read(y.low, x.high) * x.fraction;
            const acc_t bottom = read(y.high, x.low) * (acc_t(1) - x.fraction) + read(y.high, x.high) * x.fraction;
            const acc_t value = top * (acc_t(1) - y.fraction) + bottom * y.fraction;
            product += value *
                static_cast<acc_t>(
                    grad_output.at(row, channel, point_y / place.y.samples, point_x / place.x.samples));
          }
          sum += product * weight_of(map_y, prob_y) * weight_of(map_x, prob_x);
        }
      }
      sum /= place.count();
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (lane == 0) {
      grad_prob[row * stride_row + prob_y * stride_y + prob_x * stride_x] = static_cast<prob_t>(sum);
    }
  }
}

}  // namespace

void launch_backward_features(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const std::vector<Tensor>& grad_features) {
  dispatch_floating(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<accumulate_t<scalar_t>>(features, rois, prob, sampling);
    Tiles tiles{};
    for (int level = 0; level < call.levels; ++level) {
      const int64_t lines = (call.height[level] + kTileHeight - 1) / kTileHeight;
      const int64_t columns = (call.width[level] + kTileWidth - 1) / kTileWidth;
      tiles.begin[level + 1] = tiles.begin[level] + call.images * lines * columns;
    }
    const int64_t tile_count = tiles.begin[call.levels];
    const int64_t channel_blocks = (call.channels + kChannelsPerBlock - 1) / kChannelsPerBlock;
    STD_TORCH_CHECK(channel_blocks <= 65535, "too many channels: ", call.channels);
    if (tile_count == 0) {
      return;
    }
    const dim3 grid(static_cast<unsigned>(std::min(tile_count, kMaxBlocks)), static_cast<unsigned>(channel_blocks));
    backward_features_kernel<scalar_t><<<grid, kThreads, 0, current_stream(grad_output)>>>(
        call, tiles, image4_of<const scalar_t>(grad_output), pyramid_of<scalar_t>(grad_features));
    check_launch("backward for features");
  });
}

void launch_backward_prob(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, const Tensor& grad_prob) {
  dispatch_floating(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<accumulate_t<scalar_t>>(features, rois, prob, sampling);
    dispatch_floating(grad_prob.scalar_type(), [&](auto prob_zero) {
      using prob_t = decltype(prob_zero);
      backward_prob_kernel<scalar_t, prob_t>
          <<<blocks_for(grad_prob.numel() * kWarp), kThreads, 0, current_stream(grad_output)>>>(
              call, image4_of<const scalar_t>(grad_output), pyramid_of<const scalar_t>(features),
              static_cast<prob_t*>(grad_prob.mutable_data_ptr()), grad_prob.stride(0), grad_prob.stride(1),
              grad_prob.stride(2));
      check_launch("backward for prob");
    });
  });
}

}  // namespace dsg
