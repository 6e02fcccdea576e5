// From the op's arguments to a Call: the checks and the host arithmetic that both libraries share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "sampling.h"

namespace dsg {

using torch::stable::Tensor;

struct Sampling {
  int64_t out_height, out_width;
  std::vector<double> spatial_scales;
  int64_t sampling_ratio;
  bool aligned;
  double canonical_scale;
  int64_t canonical_level;
};

inline FloatView view_of(const Tensor& tensor) {
  FloatView view;
  view.data = tensor.const_data_ptr();
  view.type = tensor.scalar_type();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    view.strides[dim] = tensor.stride(dim);
  }
  return view;
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
      type == ScalarType::BFloat16;
}

// The public Python functions have said it better by now; torch.ops.dsg can be called directly too.
inline void check_arguments(
    const std::vector<Tensor>& features,
    const Tensor& rois,
    const std::optional<Tensor>& prob,
    const Sampling& sampling) {
  STD_TORCH_CHECK(
      !features.empty() && features.size() <= kMaxLevels, "1 to ", kMaxLevels, " levels, got ", features.size());
  STD_TORCH_CHECK(sampling.spatial_scales.size() == features.size(), "one spatial scale per level");
  STD_TORCH_CHECK(sampling.out_height > 0 && sampling.out_width > 0, "output sizes must be positive");
  const Tensor& first = features[0];
  for (const Tensor& level : features) {
    STD_TORCH_CHECK(level.dim() == 4, "features must be [N, C, Hf, Wf]");
    STD_TORCH_CHECK(
        level.size(0) == first.size(0) && level.size(1) == first.size(1), "levels differ in images or channels");
    STD_TORCH_CHECK(is_floating(level) && level.scalar_type() == first.scalar_type(), "levels differ in dtype");
    STD_TORCH_CHECK(level.device() == first.device(), "levels are on several devices");
  }
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "rois must be [K, 5]");
  STD_TORCH_CHECK(
      rois.scalar_type() == ScalarType::Float || rois.scalar_type() == ScalarType::Double,
      "rois must be float32 or float64");
  STD_TORCH_CHECK(rois.device() == first.device(), "rois and features are on several devices");
  if (prob.has_value()) {
    STD_TORCH_CHECK(prob->dim() == 3 && prob->size(0) == rois.size(0), "prob must be [K, Hp, Wp]");
    STD_TORCH_CHECK(prob->size(1) > 0 && prob->size(2) > 0, "prob must not be empty maps");
    STD_TORCH_CHECK(is_floating(*prob) && prob->device() == first.device(), "prob must be floats beside features");
  }
}

inline void check_grad_output(
    const Tensor& grad_output, const Tensor& features, const Tensor& rois, const Sampling& sampling) {
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == rois.size(0) && grad_output.size(1) == features.size(1) &&
          grad_output.size(2) == sampling.out_height && grad_output.size(3) == sampling.out_width,
      "grad_output must be [K, C, H, W]");
  STD_TORCH_CHECK(
      grad_output.scalar_type() == features.scalar_type() && grad_output.device() == features.device(),
      "grad_output must be of the features' dtype and device");
}

template <typename acc_t>
Call<acc_t> make_call(
    const std::vector<Tensor>& features,
    const Tensor& rois,
    const std::optional<Tensor>& prob,
    const Sampling& sampling) {
  Call<acc_t> call{};
  call.images = features[0].size(0);
  call.channels = features[0].size(1);
  call.rois = rois.size(0);
  call.out_height = sampling.out_height;
  call.out_width = sampling.out_width;
  call.sampling_ratio = sampling.sampling_ratio;
  call.aligned = sampling.aligned;
  call.levels = static_cast<int>(features.size());
  call.roi = view_of(rois);
  if (prob.has_value()) {
    call.prob_height = prob->size(1);
    call.prob_width = prob->size(2);
    call.prob = view_of(*prob);
  }
  for (int level = 0; level < call.levels; ++level) {
    call.height[level] = features[level].size(2);
    call.width[level] = features[level].size(3);
    call.scale[level] = static_cast<acc_t>(sampling.spatial_scales[level]);
    call.area_threshold[level] = static_cast<acc_t>(level_area(
        level, sampling.spatial_scales[0], sampling.canonical_scale, static_cast<double>(sampling.canonical_level)));
  }
  return call;
}

// Gradients like the features and like the map, filled with zeros or not at all; of no elements where the gradient
// is not needed.
inline std::tuple<std::vector<Tensor>, Tensor> make_gradients(
    const std::vector<Tensor>& features, const std::optional<Tensor>& prob, bool need_features, bool need_prob,
    bool fill) {
  const auto make = [fill](const Tensor& tensor, bool needed) {
    if (!needed) {
      return torch::stable::new_empty(tensor, {0});
    }
    Tensor gradient = torch::stable::empty_like(tensor);
    if (fill) {
      torch::stable::zero_(gradient);
    }
    return gradient;
  };
  std::vector<Tensor> grad_features;
  for (const Tensor& level : features) {
    grad_features.push_back(make(level, need_features));
  }
  return {grad_features, make(prob.value_or(features[0]), need_prob && prob.has_value())};
}

// Calls `function` with a value of the C++ type that `type` names.
template <typename function_t>
auto dispatch_floating(ScalarType type, const function_t& function) {
  switch (type) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(type == ScalarType::Float, "SgRoIAlign computes in float32, float64, float16 or bfloat16");
      return function(float{});
  }
}

// --- the four ops, given a device's `forward(features, rois, prob, sampling)` and `backward(...)` ---------------

template <auto forward>
Tensor forward_one(
    const Tensor& features, const Tensor& rois, const std::optional<Tensor>& prob, int64_t out_height,
    int64_t out_width, double spatial_scale, int64_t sampling_ratio, bool aligned) {
  const Sampling sampling{out_height, out_width, {spatial_scale}, sampling_ratio, aligned, 1.0, 0};
  return forward({features}, rois, prob, sampling);
}

template <auto forward>
Tensor forward_many(
    std::vector<Tensor> features, const Tensor& rois, const std::optional<Tensor>& prob, int64_t out_height,
    int64_t out_width, std::vector<double> spatial_scales, int64_t sampling_ratio, bool aligned,
    double canonical_scale, int64_t canonical_level) {
  const Sampling sampling{
      out_height, out_width, spatial_scales, sampling_ratio, aligned, canonical_scale, canonical_level};
  return forward(features, rois, prob, sampling);
}

template <auto backward>
std::tuple<Tensor, Tensor> backward_one(
    const Tensor& grad_output, const Tensor& features, const Tensor& rois, const std::optional<Tensor>& prob,
    int64_t out_height, int64_t out_width, double spatial_scale, int64_t sampling_ratio, bool aligned,
    bool need_features, bool need_prob, bool deterministic) {
  const Sampling sampling{out_height, out_width, {spatial_scale}, sampling_ratio, aligned, 1.0, 0};
  auto [grad_features, grad_prob] =
      backward(grad_output, {features}, rois, prob, sampling, need_features, need_prob, deterministic);
  return {grad_features[0], grad_prob};
}

template <auto backward>
std::tuple<std::vector<Tensor>, Tensor> backward_many(
    const Tensor& grad_output, std::vector<Tensor> features, const Tensor& rois, const std::optional<Tensor>& prob,
    int64_t out_height, int64_t out_width, std::vector<double> spatial_scales, int64_t sampling_ratio, bool aligned,
    double canonical_scale, int64_t canonical_level, bool need_features, bool need_prob, bool deterministic) {
  const Sampling sampling{
      out_height, out_width, spatial_scales, sampling_ratio, aligned, canonical_scale, canonical_level};
  return backward(grad_output, features, rois, prob, sampling, need_features, need_prob, deterministic);
}

}  // namespace dsg
