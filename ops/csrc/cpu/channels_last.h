// Feature levels with the channels of a cell side by side, in the type that sums are made in.
//
// The kernels know this layout only. Features that have it already are read where they are; others are copied, and
// only the cells that some RoI may read. Gradients take the same way back.
#pragma once

#include <algorithm>
#include <vector>

#include "../arguments.h"

namespace dsg {

constexpr int64_t kRowGrain = 4;  // rows of cells per task when copying
constexpr int64_t kChannelTile = 16;  // a cache line of floats

template <typename acc_t>
struct Cells {
  acc_t* data = nullptr;
  int64_t image_stride = 0, row_stride = 0, cell_stride = 0;

  acc_t* at(int64_t image, int64_t y, int64_t x) const {
    return data + image * image_stride + y * row_stride + x * cell_stride;
  }
};

inline bool channels_are_adjacent(const Tensor& level) {
  return level.stride(1) == 1 || level.size(1) == 1;
}

// Per level, image and row of cells: the columns [first, last) that RoIs reach.
class Footprint {
 public:
  template <typename acc_t>
  Footprint(const Call<acc_t>& call, const std::vector<Place<acc_t>>& places) {
    for (int level = 0; level < call.levels; ++level) {
      heights_.push_back(call.height[level]);
      spans_.emplace_back(call.images * call.height[level], Span{call.width[level], 0});
    }
    for (const Place<acc_t>& place : places) {
      if (place.valid) {
        const Span rows = reach(place.y), columns = reach(place.x);
        for (int64_t y = rows.first; y < rows.last; ++y) {
          Span& span = spans_[place.level][place.image * heights_[place.level] + y];
          span.first = std::min(span.first, columns.first);
          span.last = std::max(span.last, columns.last);
        }
      }
    }
  }

  // Calls copy(image, y, first column, last column) for the rows of a level that have any.
  template <typename copy_t>
  void for_rows(int level, const copy_t& copy) const {
    const std::vector<Span>& spans = spans_[level];
    torch::stable::parallel_for(0, static_cast<int64_t>(spans.size()), kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (spans[row].first < spans[row].last) {
          copy(row / heights_[level], row % heights_[level], spans[row].first, spans[row].last);
        }
      }
    });
  }

 private:
  struct Span {
    int64_t first, last;
  };

  template <typename acc_t>
  static Span reach(const Axis<acc_t>& axis) {
    // Clamped as floats: the cast of a coordinate of 1e30 would be undefined.
    const acc_t end = axis.start + axis.step * static_cast<acc_t>(axis.points), last = static_cast<acc_t>(axis.cells);
    const acc_t lowest = std::clamp(std::min(axis.start, end) - acc_t(1), acc_t(0), last);
    const acc_t highest = std::clamp(std::max(axis.start, end) + acc_t(3), acc_t(0), last);
    return {std::min(static_cast<int64_t>(lowest), axis.cells - 1), static_cast<int64_t>(highest)};
  }

  std::vector<int64_t> heights_;
  std::vector<std::vector<Span>> spans_;
};

// A buffer like a level: [N, Hf, Wf, C].
template <typename acc_t>
Cells<acc_t> cells_of_buffer(const Tensor& buffer) {
  return {static_cast<acc_t*>(buffer.mutable_data_ptr()), buffer.stride(0), buffer.stride(1), buffer.stride(2)};
}

template <typename acc_t>
constexpr ScalarType scalar_type_of = std::is_same_v<acc_t, double> ? ScalarType::Double : ScalarType::Float;

// The features of a level as cells; `buffer` keeps the copy alive where one was made.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
Cells<acc_t> read_cells(const Tensor& level, int index, const Footprint& footprint, Tensor& buffer) {
  const scalar_t* source = static_cast<const scalar_t*>(level.const_data_ptr());
  const int64_t image_stride = level.stride(0), channel_stride = level.stride(1);
  const int64_t row_stride = level.stride(2), column_stride = level.stride(3);
  if constexpr (std::is_same_v<acc_t, scalar_t>) {
    if (channels_are_adjacent(level)) {
      return {const_cast<acc_t*>(source), image_stride, row_stride, column_stride};
    }
  }
  const int64_t channels = level.size(1);
  buffer = torch::stable::new_empty(
      level, {level.size(0), level.size(2), level.size(3), channels}, scalar_type_of<acc_t>);
  const Cells<acc_t> cells = cells_of_buffer<acc_t>(buffer);
  footprint.for_rows(index, [&](int64_t image, int64_t y, int64_t first, int64_t last) {
    const scalar_t* row = source + image * image_stride + y * row_stride;
    // Tiles: few cache lines are open at once, though channels lie a whole plane apart.
    for (int64_t tile = 0; tile < channels; tile += kChannelTile) {
      const int64_t tile_end = std::min(tile + kChannelTile, channels);
      for (int64_t x = first; x < last; ++x) {
        acc_t* cell = cells.at(image, y, x);
        for (int64_t channel = tile; channel < tile_end; ++channel) {
          cell[channel] = static_cast<acc_t>(row[channel * channel_stride + x * column_stride]);
        }
      }
    }
  });
  return cells;
}

// The way back: adds nothing, writes the cells that RoIs reach into `grad`, which holds zeros.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void write_cells(const Cells<acc_t>& cells, int index, const Footprint& footprint, const Tensor& grad) {
  scalar_t* target = static_cast<scalar_t*>(grad.mutable_data_ptr());
  const int64_t image_stride = grad.stride(0), channel_stride = grad.stride(1);
  const int64_t row_stride = grad.stride(2), column_stride = grad.stride(3);
  const int64_t channels = grad.size(1);
  footprint.for_rows(index, [&](int64_t image, int64_t y, int64_t first, int64_t last) {
    scalar_t* row = target + image * image_stride + y * row_stride;
    for (int64_t tile = 0; tile < channels; tile += kChannelTile) {
      const int64_t tile_end = std::min(tile + kChannelTile, channels);
      for (int64_t x = first; x < last; ++x) {
        const acc_t* cell = cells.at(image, y, x);
        for (int64_t channel = tile; channel < tile_end; ++channel) {
          row[channel * channel_stride + x * column_stride] = static_cast<scalar_t>(cell[channel]);
        }
      }
    }
  });
}

}  // namespace dsg
