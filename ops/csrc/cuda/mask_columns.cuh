// A mask seen column by column, as COCO's run lengths read a picture, without the picture: where in each column the
// pixels change between set and not set. Pixel values are those of torch's own kernels on CUDA, to the last bit.
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

// The part of a picture that a mask may show in; ends are not part of it.
struct MaskWindow {
  int64_t top, bottom, left, right;

  DSG_DEVICE bool empty() const { return top >= bottom || left >= right; }
  // The last pixel of a column is followed by the first one of the next.
  DSG_DEVICE bool columns_touch(int64_t height) const { return top == 0 && bottom == height; }
};

DSG_DEVICE float held(float value) { return value < -kFurthest ? -kFurthest : value > kFurthest ? kFurthest : value; }
DSG_DEVICE bool is_finite(float value) { return value - value == 0.0f; }
DSG_DEVICE int64_t cut(int64_t value, int64_t most) { return value < 0 ? 0 : value > most ? most : value; }
DSG_DEVICE int64_t whole_below(float value) {
  const int64_t whole = static_cast<int64_t>(value);
  return static_cast<float>(whole) > value ? whole - 1 : whole;
}

// Torchvision's convention, see `ops/masks.py`: a border of one zero, the box grown and cut to whole pixels, the mask
// resized to them.
struct BoxMask {
  const float* mask;  // [m, m]
  int cells;  // m
  int64_t top = 0, left = 0, height = 0, width = 0;  // of the grown box
  MaskWindow window{};

  // Between which two cells of the mask with its border a row or column of pixels lies.
  struct Tap {
    int low, high;
    float low_weight, high_weight;
  };

  DSG_DEVICE BoxMask(const float* probs, int side, const float* box, int64_t picture_height, int64_t picture_width)
      : mask(probs), cells(side) {
    const float growth = static_cast<float>(static_cast<double>(side + 2) / static_cast<double>(side));
    int64_t low[2], high[2];
    for (int axis = 0; axis < 2; ++axis) {
      const float half = product(product(sum(box[axis + 2], -box[axis]), 0.5f), growth);
      const float centre = product(sum(box[axis + 2], box[axis]), 0.5f);
      const float first = sum(centre, -half), last = sum(centre, half);
      if (!is_finite(first) || !is_finite(last)) {
        return;
      }
      low[axis] = static_cast<int64_t>(held(first));
      high[axis] = static_cast<int64_t>(held(last));
    }
    top = low[1], left = low[0], height = high[1] - low[1] + 1, width = high[0] - low[0] + 1;
    window = {cut(low[1], picture_height), cut(high[1] + 1, picture_height),
              cut(low[0], picture_width), cut(high[0] + 1, picture_width)};
  }

  static DSG_DEVICE Tap tap(int64_t pixel, int64_t pixels, int side) {
    const float scale = static_cast<float>(side) / static_cast<float>(pixels);
    const float wanted = multiply_add(static_cast<float>(pixel) + 0.5f, scale, -0.5f);
    const float place = wanted > 0.0f ? wanted : 0.0f;
    const int64_t cell = static_cast<int64_t>(place);
    const int low = static_cast<int>(cell < side - 1 ? cell : side - 1);
    const float rest = sum(place, -static_cast<float>(low));
    const float weight = rest < 1.0f ? rest : 1.0f;
    return {low, low + 1 < side ? low + 1 : side - 1, sum(1.0f, -weight), weight};
  }

  // A column of the picture, read from top to bottom.
  struct Column {
    const BoxMask& of;
    Tap x;
    int known = -1;  // `low` and `high` are those of this row of cells
    float low = 0.0f, high = 0.0f;

    DSG_DEVICE float cell(int row, int column) const {
      const bool inside = row > 0 && row <= of.cells && column > 0 && column <= of.cells;
      return inside ? of.mask[(row - 1) * of.cells + column - 1] : 0.0f;
    }
    DSG_DEVICE float across(int row) const {
      return multiply_add(cell(row, x.low), x.low_weight, product(cell(row, x.high), x.high_weight));
    }
    DSG_DEVICE float value(int64_t row) {
      const Tap y = tap(row - of.top, of.height, of.cells + 2);
      if (y.low != known) {
        known = y.low;
        low = across(y.low);
        high = across(y.high);
      }
      return multiply_add(low, y.low_weight, product(high, y.high_weight));
    }
  };

  DSG_DEVICE Column column(int64_t number) const { return {*this, tap(number - left, width, cells + 2)}; }
};

// Detectron2's convention, see `ops/grid_paste.py`: sampled at the pixels' centres, zeros around the mask.
struct GridMask {
  const float* mask;  // [m, m]
  int cells;  // m
  const float* box;
  MaskWindow window{};

  // The cell before a row or column of pixels, from -1 on, and how much it and the next one count.
  struct Tap {
    int low;
    float low_weight, high_weight;
  };

  DSG_DEVICE GridMask(const float* probs, int side, const float* corners, int64_t picture_height, int64_t picture_width)
      : mask(probs), cells(side), box(corners) {
    int64_t low[2], high[2];
    for (int axis = 0; axis < 2; ++axis) {
      const float first = box[axis], last = box[axis + 2];
      if (!is_finite(first) || !is_finite(last) || last <= first) {
        return;
      }
      const float fade = (last - first) / (2.0f * static_cast<float>(side)) + 1.0f;
      // A pixel more on each side: what it costs to be sure of all that show.
      low[axis] = whole_below(held(first - fade)) - 1;
      high[axis] = whole_below(held(last + fade)) + 2;
    }
    window = {cut(low[1], picture_height), cut(high[1], picture_height),
              cut(low[0], picture_width), cut(high[0], picture_width)};
  }

  // Rounded as torch rounds `(pixel + 0.5 - low) / (high - low) * 2 - 1` on CUDA, where a division by a number is a
  // product with its inverse, and then as its `grid_sample` does.
  static DSG_DEVICE Tap tap(int64_t pixel, float low, float high, int cells) {
    const float centre = sum(static_cast<float>(pixel), 0.5f);
    const float length = static_cast<float>(static_cast<double>(high) - static_cast<double>(low));
    const float share = product(sum(centre, -low), 1.0f / length);
    const float normalised = sum(product(share, 2.0f), -1.0f);
    const float place = product(multiply_add(sum(normalised, 1.0f), static_cast<float>(cells), -1.0f), 0.5f);
    if (!(place > -1.0f && place < static_cast<float>(cells))) {
      return {-2, 0.0f, 0.0f};
    }
    const int first = static_cast<int>(whole_below(place));
    return {first, sum(static_cast<float>(first + 1), -place), sum(place, -static_cast<float>(first))};
  }

  struct Column {
    const GridMask& of;
    Tap x;

    DSG_DEVICE float cell(int row, int column) const {
      const bool inside = row >= 0 && row < of.cells && column >= 0 && column < of.cells;
      return inside ? of.mask[row * of.cells + column] : 0.0f;
    }
    DSG_DEVICE float value(int64_t row) const {
      const Tap y = tap(row, of.box[1], of.box[3], of.cells);
      float total = product(cell(y.low, x.low), product(x.low_weight, y.low_weight));
      total = multiply_add(cell(y.low, x.low + 1), product(x.high_weight, y.low_weight), total);
      total = multiply_add(cell(y.low + 1, x.low), product(x.low_weight, y.high_weight), total);
      return multiply_add(cell(y.low + 1, x.low + 1), product(x.high_weight, y.high_weight), total);
    }
  };

  DSG_DEVICE Column column(int64_t number) const { return {*this, tap(number, box[0], box[2], cells)}; }
};

// Calls `visit` with each place, counted down the picture's columns, where the mask's pixels change, in rising order.
// Returns how many pixels of the column are set. The column lies in the mask's window.
template <typename mask_t, typename visit_t>
DSG_DEVICE int32_t walk_column(
    const mask_t& mask, int64_t number, int64_t height, float threshold, const visit_t& visit) {
  const MaskWindow& window = mask.window;
  const bool touch = window.columns_touch(height);
  bool before = false;
  int32_t pixels = 0;
  if (touch && number > window.left) {
    auto last = mask.column(number - 1);
    before = last.value(height - 1) >= threshold;
  }
  auto own = mask.column(number);
  for (int64_t row = window.top; row < window.bottom; ++row) {
    const bool set = own.value(row) >= threshold;
    if (set != before) {
      visit(number * height + row);
      before = set;
    }
    pixels += set;
  }
  if (before && !(touch && number + 1 < window.right)) {
    visit(number * height + window.bottom);
  }
  return pixels;
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
