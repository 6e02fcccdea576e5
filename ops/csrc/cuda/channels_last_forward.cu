// SgRoIAlign on CUDA for channels-last features, forward: 16 bytes of neighbouring channels at a time.
#include "channels_last.cuh"

namespace dsg {
namespace {

template <typename scalar_t>
constexpr int kTogether = 16 / sizeof(scalar_t);

// Warps of a block: bins of the usual pools, 7 x 7 and 14 x 14, come out even.
constexpr int kForwardThreads = 7 * kWarp;
constexpr int kMostBins = kMostPoints / 2;

// Two sampling rows, or columns, of one bin: the cells that they read, each once, and what of each goes to which point.
// Points lie close together in a small RoI, and then most of their cells are the same.
struct BinTap {
  int count;  // cells; points outside the level have none
  int offset[4];  // of each cell, in elements of the level
  float2 weight[4];  // of the first and the second point
};

__device__ __forceinline__ void add_cell(BinTap& bin, int offset, float2 weight) {
  for (int i = 0; i < bin.count; ++i) {
    if (bin.offset[i] == offset) {
      bin.weight[i].x += weight.x;
      bin.weight[i].y += weight.y;
      return;
    }
  }
  bin.offset[bin.count] = offset;
  bin.weight[bin.count] = weight;
  ++bin.count;
}

__device__ __forceinline__ void make_bin_tap(
    const PointTap& first, const PointTap& second, int64_t stride, BinTap& bin) {
  const int step = static_cast<int>(stride);
  bin.count = 0;
  if (first.low >= 0) {
    add_cell(bin, first.low * step, {1.0f - first.fraction, 0.0f});
    add_cell(bin, first.high * step, {first.fraction, 0.0f});
  }
  if (second.low >= 0) {
    add_cell(bin, second.low * step, {0.0f, 1.0f - second.fraction});
    add_cell(bin, second.high * step, {0.0f, second.fraction});
  }
}

// One bin of two by two points, cell by cell; all that it reads is asked for at once. `guide`: 1 + p of the points.
template <int rows, int columns, typename scalar_t, int count>
__device__ __forceinline__ void sum_cells(
    const scalar_t* image, const BinTap& y, const BinTap& x, const float (&guide)[2][2], float (&sums)[count]) {
  Pack<scalar_t, count> packs[rows][columns];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      packs[row][column] =
          *reinterpret_cast<const Pack<scalar_t, count>*>(image + y.offset[row] + x.offset[column]);
    }
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    const float2 own = y.weight[row];
    const float left = guide[0][0] * own.x + guide[1][0] * own.y, right = guide[0][1] * own.x + guide[1][1] * own.y;
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      const float weight = left * x.weight[column].x + right * x.weight[column].y;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        sums[i] += weight * static_cast<float>(packs[row][column].values[i]);
      }
    }
  }
}

template <int rows, typename scalar_t, int count>
__device__ __forceinline__ bool sum_rows(
    const scalar_t* image, const BinTap& y, const BinTap& x, const float (&guide)[2][2], float (&sums)[count]) {
  if (x.count == 2) {
    sum_cells<rows, 2>(image, y, x, guide, sums);
  } else if (x.count == 3) {
    sum_cells<rows, 3>(image, y, x, guide, sums);
  } else if (x.count == 4) {
    sum_cells<rows, 4>(image, y, x, guide, sums);
  } else {
    return false;
  }
  return true;
}

// False at the level's border, where a point may have one cell or none.
template <typename scalar_t, int count>
__device__ __forceinline__ bool sum_bin(
    const scalar_t* image, const BinTap& y, const BinTap& x, const float (&guide)[2][2], float (&sums)[count]) {
  if (y.count == 2) {
    return sum_rows<2>(image, y, x, guide, sums);
  }
  if (y.count == 3) {
    return sum_rows<3>(image, y, x, guide, sums);
  }
  return y.count == 4 && sum_rows<4>(image, y, x, guide, sums);
}

// One bin, point by point, for any number of points; those outside the level add nothing.
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

// A block a RoI and a warp's width of channels; the widths outermost, so that what the blocks of one moment read of a
// picture fits into the cache.
template <typename scalar_t>
__global__ void __launch_bounds__(kForwardThreads, 4) forward_channels_last_kernel(
    const Call<float> call, const Pyramid<const scalar_t> pyramid, scalar_t* __restrict__ output) {
  constexpr int count = kTogether<scalar_t>;
  __shared__ BlockRoi roi;
  __shared__ BinTap taps_y[kMostBins], taps_x[kMostBins];
  const bool guided = call.prob_height > 0, pairs = call.sampling_ratio == 2;
  const int groups = static_cast<int>(call.channels) / count, width = min(groups, kWarp);
  const int group = blockIdx.y * width + threadIdx.x % width, at_once = kForwardThreads / width;
  const int out_height = static_cast<int>(call.out_height), out_width = static_cast<int>(call.out_width);
  const int bins = out_height * out_width, first_bin = threadIdx.x / width;
  const bool works = group < groups && first_bin < at_once;
  for (int64_t row = blockIdx.x; row < call.rois; row += gridDim.x) {
    const bool valid = read_roi(call, row, guided, roi);
    const Image4<const scalar_t>& level = pyramid.level[roi.place.level];
    if (valid && pairs) {
      for (int bin = threadIdx.x; bin < out_height + out_width; bin += kForwardThreads) {
        if (bin < out_height) {
          make_bin_tap(roi.y[2 * bin], roi.y[2 * bin + 1], level.strides[2], taps_y[bin]);
        } else {
          const int column = bin - out_height;
          make_bin_tap(roi.x[2 * column], roi.x[2 * column + 1], level.strides[3], taps_x[column]);
        }
      }
      __syncthreads();
    }
    const int samples = static_cast<int>(roi.place.y.samples), points_x = static_cast<int>(roi.place.x.points);
    const scalar_t* channels = level.data + (valid ? roi.place.image * level.strides[0] : 0) + group * count;
    const float share = 1.0f / roi.place.count();
    int bin_y = first_bin / out_width, bin_x = first_bin % out_width;
    for (int bin = first_bin; works && bin < bins; bin += at_once) {
      float sums[count] = {};
      bool done = !valid;
      if (valid && pairs) {
        float guide[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
        if (guided) {
          const float* maps = roi.guidance + 2 * (bin_y * points_x + bin_x);
          guide[0][0] = maps[0], guide[0][1] = maps[1];
          guide[1][0] = maps[points_x], guide[1][1] = maps[points_x + 1];
        }
        done = sum_bin(channels, taps_y[bin_y], taps_x[bin_x], guide, sums);
      }
      if (!done) {
        sum_points<scalar_t, count>(
            channels, level, roi, bin_y * samples, bin_x * samples, samples, guided, sums);
      }
      Pack<scalar_t, count> pack;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        pack.values[i] = static_cast<scalar_t>(sums[i] * share);
      }
      scalar_t* target = output + (row * bins + bin) * call.channels + group * count;
      *reinterpret_cast<Pack<scalar_t, count>*>(target) = pack;
      for (bin_x += at_once; bin_x >= out_width; bin_x -= out_width) {
        ++bin_y;
      }
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
    const int64_t width = kTogether<scalar_t> * kWarp;
    const dim3 blocks(blocks_of_rois(call), static_cast<unsigned>((call.channels + width - 1) / width));
    forward_channels_last_kernel<scalar_t><<<blocks, kForwardThreads, 0, current_stream(output)>>>(
        call, pyramid_of<const scalar_t>(features), static_cast<scalar_t*>(output.mutable_data_ptr()));
    check_launch("forward, channels last");
  });
  return true;
}

}  // namespace dsg
