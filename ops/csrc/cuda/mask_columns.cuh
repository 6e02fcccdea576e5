// A mask seen column by column, as COCO's run lengths read a picture, without the picture: where in each column the
// pixels change between set and not set. Pixel values are those of torch's bilinear resize on CUDA, to the last bit.
//
// Letters: m side of a mask, H and W of a picture.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DSG_DEVICE __device__ __forceinline__
#else  // a program that checks this on the host
#include <cmath>
#define DSG_DEVICE inline
#endif

namespace dsg {

// Corners are held within this: further than any picture reaches, and far from int64's end.
constexpr float kFurthest = 1099511627776.0f;

// Products and sums are rounded where NumPy rounds them for the CPU's masks: no fused multiply-add unless asked for.
#ifdef __CUDACC__
DSG_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DSG_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
DSG_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
DSG_DEVICE float product(float a, float b) { return a * b; }
DSG_DEVICE float sum(float a, float b) { return a + b; }
DSG_DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
#endif

// A box with its mask's border, in whole pixels, and what of it shows in the picture; ends are not part of it.
struct MaskWindow {
  int64_t box_top, box_left, box_height, box_width;
  int64_t top, bottom, left, right;

  DSG_DEVICE bool empty() const { return top >= bottom || left >= right; }
  // The last pixel of a column is followed by the first one of the next.
  DSG_DEVICE bool columns_touch(int64_t height) const { return top == 0 && bottom == height; }
};

DSG_DEVICE float held(float value) { return value < -kFurthest ? -kFurthest : value > kFurthest ? kFurthest : value; }

// growth: (m + 2) / m. Boxes that are not finite have an empty window.
DSG_DEVICE MaskWindow mask_window(const float* box, float growth, int64_t height, int64_t width) {
  int64_t low[2], high[2];
  for (int axis = 0; axis < 2; ++axis) {
    const float half = product(product(sum(box[axis + 2], -box[axis]), 0.5f), growth);
    const float centre = product(sum(box[axis + 2], box[axis]), 0.5f);
    const float first = sum(centre, -half), last = sum(centre, half);
    if (!(first - first == 0.0f) || !(last - last == 0.0f)) {
      return {};
    }
    low[axis] = static_cast<int64_t>(held(first));
    high[axis] = static_cast<int64_t>(held(last));
  }
  const auto cut = [](int64_t value, int64_t most) { return value < 0 ? int64_t{0} : value > most ? most : value; };
  return {low[1], low[0], high[1] - low[1] + 1, high[0] - low[0] + 1,
          cut(low[1], height), cut(high[1] + 1, height), cut(low[0], width), cut(high[0] + 1, width)};
}

// Between which two cells of the mask with its border a row or column of pixels lies.
struct MaskTap {
  int low, high;
  float low_weight, high_weight;
};

DSG_DEVICE MaskTap mask_tap(int64_t pixel, int64_t pixels, int side) {
  const float scale = static_cast<float>(side) / static_cast<float>(pixels);
  const float wanted = multiply_add(static_cast<float>(pixel) + 0.5f, scale, -0.5f);
  const float place = wanted > 0.0f ? wanted : 0.0f;
  const int64_t cell = static_cast<int64_t>(place);
  const int low = static_cast<int>(cell < side - 1 ? cell : side - 1);
  const float rest = sum(place, -static_cast<float>(low));
  const float weight = rest < 1.0f ? rest : 1.0f;
  return {low, low + 1 < side ? low + 1 : side - 1, sum(1.0f, -weight), weight};
}

// One column of a mask [m, m] with its border of zeros.
struct MaskColumn {
  const float* mask;
  int cells;  // m
  MaskTap x;

  DSG_DEVICE float cell(int row, int column) const {
    const bool inside = row > 0 && row <= cells && column > 0 && column <= cells;
    return inside ? mask[(row - 1) * cells + column - 1] : 0.0f;
  }
  DSG_DEVICE float across(int row) const {
    return multiply_add(cell(row, x.low), x.low_weight, product(cell(row, x.high), x.high_weight));
  }
};

DSG_DEVICE float mask_value(const MaskTap& y, float low, float high) {
  return multiply_add(low, y.low_weight, product(high, y.high_weight));
}

// Calls `visit` with each place, counted down the picture's columns, where the mask's pixels change, in rising order.
template <typename visit_t>
DSG_DEVICE void walk_column(
    const float* mask, int cells, const MaskWindow& window, int64_t column, int64_t height, float threshold,
    const visit_t& visit) {
  const int side = cells + 2;
  const bool touch = window.columns_touch(height);
  bool before = false;
  if (touch && column > window.left) {
    const MaskColumn last{mask, cells, mask_tap(column - 1 - window.box_left, window.box_width, side)};
    const MaskTap y = mask_tap(height - 1 - window.box_top, window.box_height, side);
    before = mask_value(y, last.across(y.low), last.across(y.high)) >= threshold;
  }
  const MaskColumn own{mask, cells, mask_tap(column - window.box_left, window.box_width, side)};
  int known = -1;  // `low` and `high` are those of this row of cells
  float low = 0.0f, high = 0.0f;
  for (int64_t row = window.top; row < window.bottom; ++row) {
    const MaskTap y = mask_tap(row - window.box_top, window.box_height, side);
    if (y.low != known) {
      known = y.low;
      low = own.across(y.low);
      high = own.across(y.high);
    }
    const bool set = mask_value(y, low, high) >= threshold;
    if (set != before) {
      visit(column * height + row);
      before = set;
    }
  }
  if (before && !(touch && column + 1 < window.right)) {
    visit(column * height + window.bottom);
  }
}

// The counts of one mask, made from its changes.
struct RunCounts {
  const int32_t* changes;
  int64_t length;  // of `changes`
  int64_t pixels;  // H * W

  // A run of zeros is written after the last change, unless that is the picture's end.
  DSG_DEVICE int64_t counts() const { return length + !(length > 0 && changes[length - 1] == pixels); }
  DSG_DEVICE int64_t edge(int64_t index) const { return index < 0 ? 0 : index < length ? changes[index] : pixels; }
  DSG_DEVICE int64_t count(int64_t index) const { return edge(index) - edge(index - 1); }
  // What is written: from the fourth count on the difference to the count two before it.
  DSG_DEVICE int64_t written(int64_t index) const {
    return index > 2 ? count(index) - count(index - 2) : count(index);
  }
};

// Calls `visit` with each character of a number: 5 bits each, the lowest first, as `ops/rle.py` says.
template <typename visit_t>
DSG_DEVICE void write_number(int64_t number, const visit_t& visit) {
  bool more = true;
  while (more) {
    const int group = static_cast<int>(number & 0x1f);
    number >>= 5;
    more = number != ((group & 0x10) != 0 ? -1 : 0);
    visit(static_cast<unsigned char>(group + (more ? 0x20 : 0) + 48));
  }
}

}  // namespace dsg
