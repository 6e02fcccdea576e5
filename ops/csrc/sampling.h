// Where the sampling points of a RoI lie: the arithmetic that the CPU and the CUDA kernels share.
//
// N images, C channels, R RoIs, H x W the output, Hp x Wp a probability map, S sampling points of a bin along one
// axis. Points of an axis are counted 0 .. H * S - 1; point j belongs to bin j / S. ops/_reference.py is the
// specification; the same quantities have the same names there.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DSG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSG_HOST_DEVICE inline
#endif

namespace dsg {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int kMaxLevels = 8;
// A box of 1e30 pixels is finite too: adaptive sampling must end all the same.
constexpr int kMaxAdaptiveSamples = 2048;

// float64 is computed in itself, everything below it in float32.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename scalar_t>
using accumulate_t = typename Accumulate<scalar_t>::type;

// A small input whose dtype need not be that of the features: RoIs and probability maps. Converted as it is read,
// which costs no launch and no copy.
struct FloatView {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t strides[3] = {0, 0, 0};

  template <typename acc_t>
  DSG_HOST_DEVICE acc_t at(int64_t first, int64_t second, int64_t third = 0) const {
    const int64_t offset = first * strides[0] + second * strides[1] + third * strides[2];
    switch (type) {
      case ScalarType::Double:
        return static_cast<acc_t>(static_cast<const double*>(data)[offset]);
      case ScalarType::Half:
        return static_cast<acc_t>(static_cast<float>(static_cast<const Half*>(data)[offset]));
      case ScalarType::BFloat16:
        return static_cast<acc_t>(static_cast<float>(static_cast<const BFloat16*>(data)[offset]));
      default:
        return static_cast<acc_t>(static_cast<const float*>(data)[offset]);
    }
  }
};

// The shape of a call. Plain values, so that it can travel to the GPU as a kernel's argument.
template <typename acc_t>
struct Call {
  int64_t images, channels, rois, out_height, out_width;
  int64_t prob_height, prob_width;  // 0 x 0: no map, plain RoIAlign
  int64_t sampling_ratio;
  bool aligned;
  int levels;
  int64_t height[kMaxLevels], width[kMaxLevels];
  acc_t scale[kMaxLevels];
  acc_t area_threshold[kMaxLevels];  // [i]: from this area on a RoI goes to level i, or beyond; [0] is not used
  FloatView roi, prob;
};

// The area, in square image pixels, from which on a RoI goes to a level, or beyond:
// level >= i where floor(canonical_level + log2(sqrt(area) / canonical_scale + 1e-6)) >= i, solved for the area.
inline double level_area(int level, double first_scale, double canonical_scale, double canonical_level) {
  const double first_level = std::floor(-std::log2(first_scale) + 0.5);
  const double relative = std::exp2(first_level + level - canonical_level) - 1e-6;
  const double side = canonical_scale * (relative > 0.0 ? relative : 0.0);
  return side * side;
}

// One RoI along one axis.
template <typename acc_t>
struct Axis {
  acc_t start;  // of the RoI, in feature pixels
  acc_t step;  // from point to point, in feature pixels
  int64_t cells;  // of the level
  int64_t samples;  // S
  int64_t points;  // bins * S
};

template <typename acc_t>
struct Place {
  bool valid;
  int level;
  int64_t image;
  Axis<acc_t> y, x;

  // What a bin's mean divides by.
  DSG_HOST_DEVICE acc_t count() const {
    const int64_t samples = y.samples * x.samples;
    return static_cast<acc_t>(samples > 0 ? samples : 1);
  }
};

// The two cells that a point lies between.
template <typename acc_t>
struct Tap {
  int64_t low, high;
  acc_t fraction;  // weight of `high`
};

template <typename acc_t>
DSG_HOST_DEVICE bool is_finite(acc_t value) {
  return value - value == acc_t(0);  // inf - inf and nan - nan are nan
}

template <typename acc_t>
DSG_HOST_DEVICE Axis<acc_t> make_axis(
    acc_t start, acc_t extent, int64_t cells, int64_t bins, const Call<acc_t>& call) {
  if (!call.aligned && extent < acc_t(1)) {
    extent = acc_t(1);  // the old convention: no RoI is smaller than a feature pixel
  }
  int64_t samples = call.sampling_ratio;
  if (samples <= 0) {
    const acc_t wanted = std::ceil(extent / static_cast<acc_t>(bins));
    const acc_t most = static_cast<acc_t>(kMaxAdaptiveSamples);
    samples = wanted > acc_t(0) ? static_cast<int64_t>(wanted < most ? wanted : most) : 0;
  }
  const int64_t points = bins * samples;
  const acc_t step = extent / static_cast<acc_t>(points > 0 ? points : 1);
  return {start, step, cells, samples, points};
}

template <typename acc_t>
DSG_HOST_DEVICE Place<acc_t> place_roi(const Call<acc_t>& call, int64_t row) {
  Place<acc_t> place{};
  const acc_t image = call.roi.template at<acc_t>(row, 0);
  const acc_t x1 = call.roi.template at<acc_t>(row, 1), y1 = call.roi.template at<acc_t>(row, 2);
  const acc_t x2 = call.roi.template at<acc_t>(row, 3), y2 = call.roi.template at<acc_t>(row, 4);
  // Written so that nan fails.
  const bool in_batch = image >= acc_t(0) && image < static_cast<acc_t>(call.images) && image == std::floor(image);
  if (!in_batch || !is_finite(x1) || !is_finite(y1) || !is_finite(x2) || !is_finite(y2)) {
    return place;
  }
  const acc_t area = (x2 - x1) * (y2 - y1);
  for (int level = 1; level < call.levels; ++level) {
    place.level += area >= call.area_threshold[level];
  }
  const acc_t scale = call.scale[place.level];
  const acc_t shift = call.aligned ? acc_t(0.5) : acc_t(0);
  const int64_t height = call.height[place.level], width = call.width[place.level];
  place.y = make_axis(scale * y1 - shift, scale * (y2 - y1), height, call.out_height, call);
  place.x = make_axis(scale * x1 - shift, scale * (x2 - x1), width, call.out_width, call);
  place.image = static_cast<int64_t>(image);
  place.valid = height > 0 && width > 0;
  return place;
}

// The cells of the feature level around a point; false when it lies more than a pixel outside and adds nothing.
template <typename acc_t>
DSG_HOST_DEVICE bool feature_tap(const Axis<acc_t>& axis, int64_t point, Tap<acc_t>& tap) {
  acc_t place = axis.start + (static_cast<acc_t>(point) + acc_t(0.5)) * axis.step;
  const acc_t last = static_cast<acc_t>(axis.cells - 1);
  if (!(place >= acc_t(-1) && place <= static_cast<acc_t>(axis.cells))) {
    return false;
  }
  place = place < acc_t(0) ? acc_t(0) : (place > last ? last : place);
  tap.low = static_cast<int64_t>(place);
  tap.high = tap.low + 1 < axis.cells ? tap.low + 1 : tap.low;
  tap.fraction = place - static_cast<acc_t>(tap.low);
  return true;
}

// [begin, end): all points, and perhaps a few more, that are read from a cell in first .. last.
template <typename acc_t>
DSG_HOST_DEVICE void touching_points(
    const Axis<acc_t>& axis, int64_t first, int64_t last, int64_t& begin, int64_t& end) {
  const acc_t points = static_cast<acc_t>(axis.points);
  acc_t low = acc_t(0), high = points;
  if (axis.step != acc_t(0)) {
    const acc_t a = (static_cast<acc_t>(first - 1) - axis.start) / axis.step;
    const acc_t b = (static_cast<acc_t>(last + 1) - axis.start) / axis.step;
    low = (a < b ? a : b) - acc_t(2);
    high = (a < b ? b : a) + acc_t(2);
  }
  // Clamped as floats: a coordinate of 1e30 fits no integer.
  begin = static_cast<int64_t>(low < acc_t(0) ? acc_t(0) : (low > points ? points : low));
  end = static_cast<int64_t>(high < acc_t(0) ? acc_t(0) : (high > points ? points : high));
}

// How much of a point is read from `cell`.
template <typename acc_t>
DSG_HOST_DEVICE acc_t weight_of(const Tap<acc_t>& tap, int64_t cell) {
  return (tap.low == cell ? acc_t(1) - tap.fraction : acc_t(0)) + (tap.high == cell ? tap.fraction : acc_t(0));
}

// The cells of the probability map around a point: clamped to the map, never outside it.
template <typename acc_t>
DSG_HOST_DEVICE Tap<acc_t> prob_tap(int64_t points, int64_t point, int64_t cells) {
  const acc_t ratio = static_cast<acc_t>(cells) / static_cast<acc_t>(points);
  acc_t place = (static_cast<acc_t>(point) + acc_t(0.5)) * ratio - acc_t(0.5);
  const acc_t last = static_cast<acc_t>(cells - 1);
  place = place < acc_t(0) ? acc_t(0) : (place > last ? last : place);
  Tap<acc_t> tap;
  tap.low = static_cast<int64_t>(place);
  tap.high = tap.low + 1 < cells ? tap.low + 1 : tap.low;
  tap.fraction = place - static_cast<acc_t>(tap.low);
  return tap;
}

// 1 + p at a point of RoI `row`; 1 where there is no map.
template <typename acc_t>
DSG_HOST_DEVICE acc_t guidance(const Call<acc_t>& call, int64_t row, const Tap<acc_t>& y, const Tap<acc_t>& x) {
  const acc_t top = call.prob.template at<acc_t>(row, y.low, x.low) * (acc_t(1) - x.fraction) +
      call.prob.template at<acc_t>(row, y.low, x.high) * x.fraction;
  const acc_t bottom = call.prob.template at<acc_t>(row, y.high, x.low) * (acc_t(1) - x.fraction) +
      call.prob.template at<acc_t>(row, y.high, x.high) * x.fraction;
  return acc_t(1) + top * (acc_t(1) - y.fraction) + bottom * y.fraction;
}

}  // namespace dsg
