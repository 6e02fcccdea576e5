// SgRoIAlign on the CPU: forward parallel over RoIs, gradient of the features parallel over channels.
//
// No sum is ever split between threads, so every result is the same whatever their number: nothing is left for
// `deterministic` to choose.

#include <vector>

#include "channel_math.h"
#include "channels_last.h"
#include "points.h"

namespace dsg {
namespace {

constexpr int64_t kRoiGrain = 4;
constexpr int64_t kChannelGrain = 16;  // a cache line of floats, so that threads share none

template <typename acc_t>
std::vector<Place<acc_t>> place_rois(const Call<acc_t>& call) {
  std::vector<Place<acc_t>> places;
  places.reserve(call.rois);
  for (int64_t row = 0; row < call.rois; ++row) {
    places.push_back(place_roi(call, row));
  }
  return places;
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
struct Levels {
  std::vector<Cells<acc_t>> cells;
  std::vector<Tensor> buffers;

  Levels(const std::vector<Tensor>& features, const Footprint& footprint) : buffers(features.size()) {
    for (size_t level = 0; level < features.size(); ++level) {
      cells.push_back(read_cells<scalar_t>(features[level], static_cast<int>(level), footprint, buffers[level]));
    }
  }
};

template <typename scalar_t>
void run_forward(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling, const Tensor& output) {
  using acc_t = accumulate_t<scalar_t>;
  const auto call = make_call<acc_t>(features, rois, prob, sampling);
  const auto places = place_rois(call);
  const Levels<scalar_t> levels(features, Footprint(call, places));
  const int64_t bins = call.out_height * call.out_width, channels = call.channels;
  scalar_t* target = static_cast<scalar_t*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, call.rois, kRoiGrain, [&](int64_t begin, int64_t end) {
    Points<acc_t> points(call);
    std::vector<acc_t*> rows;
    std::vector<acc_t> weights, sums(bins * channels);
    for (int64_t row = begin; row < end; ++row) {
      scalar_t* pooled = target + row * channels * bins;  // [C, H, W]
      if (!places[row].valid) {
        std::fill(pooled, pooled + channels * bins, scalar_t(0));
        continue;
      }
      points.move_to(places[row], row);
      for (int64_t bin = 0; bin < bins; ++bin) {
        points.gather_bin(
            bin / call.out_width, bin % call.out_width, levels.cells[places[row].level], 0, rows, weights);
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

// grad_output of RoI `row`, channels [first, last) -> [H * W, last - first] in `values`.
template <typename scalar_t, typename acc_t>
void load_grad(const Tensor& grad_output, int64_t row, int64_t first, int64_t last, std::vector<acc_t>& values) {
  const scalar_t* source = static_cast<const scalar_t*>(grad_output.const_data_ptr()) + row * grad_output.stride(0);
  const int64_t height = grad_output.size(2), width = grad_output.size(3);
  values.resize(height * width * (last - first));
  for (int64_t channel = first; channel < last; ++channel) {
    for (int64_t y = 0; y < height; ++y) {
      const scalar_t* line = source + channel * grad_output.stride(1) + y * grad_output.stride(2);
      for (int64_t x = 0; x < width; ++x) {
        values[(y * width + x) * (last - first) + channel - first] =
            static_cast<acc_t>(line[x * grad_output.stride(3)]);
      }
    }
  }
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void run_backward_features(
    const Call<acc_t>& call, const std::vector<Place<acc_t>>& places, const Footprint& footprint,
    const Tensor& grad_output, const std::vector<Tensor>& grad_features) {
  std::vector<Cells<acc_t>> cells;
  std::vector<Tensor> buffers;
  for (const Tensor& grad : grad_features) {
    buffers.push_back(torch::stable::new_zeros(
        grad, {grad.size(0), grad.size(2), grad.size(3), grad.size(1)}, scalar_type_of<acc_t>));
    cells.push_back(cells_of_buffer<acc_t>(buffers.back()));
  }
  const int64_t blocks = (call.channels + kChannelGrain - 1) / kChannelGrain;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChannelGrain, last = std::min(end * kChannelGrain, call.channels);
    Points<acc_t> points(call);
    std::vector<acc_t*> rows;
    std::vector<acc_t> weights, values;
    for (int64_t row = 0; row < call.rois; ++row) {
      if (!places[row].valid) {
        continue;
      }
      points.move_to(places[row], row);
      load_grad<scalar_t>(grad_output, row, first, last, values);
      for (int64_t bin = 0; bin < call.out_height * call.out_width; ++bin) {
        points.gather_bin(
            bin / call.out_width, bin % call.out_width, cells[places[row].level], first, rows, weights);
        add_to_rows(
            rows.data(), weights.data(), static_cast<int64_t>(rows.size()), values.data() + bin * (last - first),
            last - first);
      }
    }
  });
  for (size_t level = 0; level < grad_features.size(); ++level) {
    write_cells<scalar_t>(cells[level], static_cast<int>(level), footprint, grad_features[level]);
  }
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void run_backward_prob(
    const Call<acc_t>& call, const std::vector<Place<acc_t>>& places, const Footprint& footprint,
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& grad_prob) {
  const Levels<scalar_t> levels(features, footprint);
  const int64_t cells_of_map = call.prob_height * call.prob_width;
  Call<acc_t> plain = call;  // the gradient is that of the factor p: (1 + p) itself does not appear in it
  plain.prob_height = plain.prob_width = 0;
  torch::stable::parallel_for(0, call.rois, kRoiGrain, [&](int64_t begin, int64_t end) {
    Points<acc_t> points(plain);
    std::vector<acc_t> values, sums;
    for (int64_t row = begin; row < end; ++row) {
      const Place<acc_t>& place = places[row];
      sums.assign(cells_of_map, acc_t(0));  // [Hp, Wp]
      if (place.valid) {
        points.move_to(place, row);
        load_grad<scalar_t>(grad_output, row, 0, call.channels, values);
        const Cells<acc_t>& cells = levels.cells[place.level];
        for (int64_t bin = 0; bin < call.out_height * call.out_width; ++bin) {
          const acc_t* grad = values.data() + bin * call.channels;
          const auto product = [&](int64_t y, int64_t x) {
            return dot(grad, cells.at(place.image, y, x), call.channels);
          };
          points.for_bin(
              bin / call.out_width, bin % call.out_width,
              [&](int64_t point_y, int64_t point_x, const Tap<acc_t>& y, const Tap<acc_t>& x, acc_t share) {
                const acc_t top = product(y.low, x.low) * (acc_t(1) - x.fraction) + product(y.low, x.high) * x.fraction;
                const acc_t bottom =
                    product(y.high, x.low) * (acc_t(1) - x.fraction) + product(y.high, x.high) * x.fraction;
                const acc_t grad_point = share * (top * (acc_t(1) - y.fraction) + bottom * y.fraction);
                const auto v = prob_tap<acc_t>(place.y.points, point_y, call.prob_height);
                const auto u = prob_tap<acc_t>(place.x.points, point_x, call.prob_width);
                sums[v.low * call.prob_width + u.low] += grad_point * (acc_t(1) - v.fraction) * (acc_t(1) - u.fraction);
                sums[v.low * call.prob_width + u.high] += grad_point * (acc_t(1) - v.fraction) * u.fraction;
                sums[v.high * call.prob_width + u.low] += grad_point * v.fraction * (acc_t(1) - u.fraction);
                sums[v.high * call.prob_width + u.high] += grad_point * v.fraction * u.fraction;
              });
        }
      }
      dispatch_floating(grad_prob.scalar_type(), [&](auto zero) {
        using prob_t = decltype(zero);
        prob_t* target = static_cast<prob_t*>(grad_prob.mutable_data_ptr()) + row * grad_prob.stride(0);
        for (int64_t cell = 0; cell < cells_of_map; ++cell) {
          const int64_t y = cell / call.prob_width, x = cell % call.prob_width;
          target[y * grad_prob.stride(1) + x * grad_prob.stride(2)] = static_cast<prob_t>(sums[cell]);
        }
      });
    }
  });
}

Tensor forward(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling) {
  check_arguments(features, rois, prob, sampling);
  const Tensor output = torch::stable::new_empty(
      features[0], {rois.size(0), features[0].size(1), sampling.out_height, sampling.out_width});
  if (output.numel() > 0) {
    dispatch_floating(features[0].scalar_type(), [&](auto zero) {
      run_forward<decltype(zero)>(features, rois, prob, sampling, output);
    });
  }
  return output;
}

std::tuple<std::vector<Tensor>, Tensor> backward(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, bool need_features, bool need_prob,
    bool /*deterministic*/) {
  check_arguments(features, rois, prob, sampling);
  check_grad_output(grad_output, features[0], rois, sampling);
  auto [grad_features, grad_prob] = make_gradients(features, prob, need_features, need_prob, true);
  if (grad_output.numel() > 0) {
    dispatch_floating(features[0].scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = accumulate_t<scalar_t>;
      const auto call = make_call<acc_t>(features, rois, prob, sampling);
      const auto places = place_rois(call);
      const Footprint footprint(call, places);
      if (need_features) {
        run_backward_features<scalar_t>(call, places, footprint, grad_output, grad_features);
      }
      if (need_prob && prob.has_value()) {
        run_backward_prob<scalar_t>(call, places, footprint, grad_output, features, grad_prob);
      }
    });
  }
  return {grad_features, grad_prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsg, CPU, library) {
  library.impl("sg_roi_align", TORCH_BOX(&forward_one<forward>));
  library.impl("multiscale_sg_roi_align", TORCH_BOX(&forward_many<forward>));
  library.impl("sg_roi_align_backward", TORCH_BOX(&backward_one<backward>));
  library.impl("multiscale_sg_roi_align_backward", TORCH_BOX(&backward_many<backward>));
}

}  // namespace dsg
