// The sampling points of one RoI at a time, bin by bin.
#pragma once

#include <utility>
#include <vector>

#include "channels_last.h"

namespace dsg {

// One per thread, moved from RoI to RoI, so that its memory is reused.
template <typename acc_t>
class Points {
 public:
  explicit Points(const Call<acc_t>& call) : call_(call) {}

  void move_to(const Place<acc_t>& place, int64_t row) {
    place_ = place;
    row_ = row;
    find(place.y, y_taps_, y_inside_);
    find(place.x, x_taps_, x_inside_);
  }

  // Calls visit(y point, x point, y tap, x tap, (1 + p) / number of points) for the bin's points inside the level.
  template <typename visit_t>
  void for_bin(int64_t bin_y, int64_t bin_x, const visit_t& visit) const {
    const acc_t share = acc_t(1) / place_.count();
    for (int64_t y = bin_y * place_.y.samples; y < (bin_y + 1) * place_.y.samples; ++y) {
      if (!y_inside_[y]) {
        continue;
      }
      for (int64_t x = bin_x * place_.x.samples; x < (bin_x + 1) * place_.x.samples; ++x) {
        if (x_inside_[x]) {
          visit(y, x, y_taps_[y], x_taps_[x], share * guide(y, x));
        }
      }
    }
  }

  // The cells and weights of a bin: output = sum of weights * cells.
  void gather_bin(
      int64_t bin_y, int64_t bin_x, const Cells<acc_t>& cells, int64_t first_channel, std::vector<acc_t*>& rows,
      std::vector<acc_t>& weights) const {
    rows.clear();
    weights.clear();
    for_bin(bin_y, bin_x, [&](int64_t, int64_t, const Tap<acc_t>& y, const Tap<acc_t>& x, acc_t share) {
      const acc_t low = share * (acc_t(1) - y.fraction), high = share * y.fraction;
      for (const auto& [cell_y, weight_y] : {std::pair{y.low, low}, std::pair{y.high, high}}) {
        rows.push_back(cells.at(place_.image, cell_y, x.low) + first_channel);
        weights.push_back(weight_y * (acc_t(1) - x.fraction));
        rows.push_back(cells.at(place_.image, cell_y, x.high) + first_channel);
        weights.push_back(weight_y * x.fraction);
      }
    });
  }

 private:
  static void find(const Axis<acc_t>& axis, std::vector<Tap<acc_t>>& taps, std::vector<char>& inside) {
    taps.resize(axis.points);
    inside.resize(axis.points);
    for (int64_t point = 0; point < axis.points; ++point) {
      inside[point] = feature_tap(axis, point, taps[point]);
    }
  }

  acc_t guide(int64_t y, int64_t x) const {
    if (call_.prob_height == 0) {
      return acc_t(1);
    }
    return guidance(
        call_, row_, prob_tap<acc_t>(place_.y.points, y, call_.prob_height),
        prob_tap<acc_t>(place_.x.points, x, call_.prob_width));
  }

  const Call<acc_t>& call_;
  Place<acc_t> place_;
  int64_t row_ = 0;
  std::vector<Tap<acc_t>> y_taps_, x_taps_;
  std::vector<char> y_inside_, x_inside_;
};

}  // namespace dsg
