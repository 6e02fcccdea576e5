// SgRoIAlign on CUDA: the ops, in terms of the launches.
#include "channels_last.cuh"

#include <torch/csrc/stable/accelerator.h>

namespace dsg {
namespace {

using torch::stable::accelerator::DeviceGuard;

// ops/_register.py asks the same of its fakes.
bool is_channels_last(const Tensor& features) {
  return features.size(1) > 1 && features.stride(1) == 1;
}

Tensor forward(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling) {
  check_arguments(features, rois, prob, sampling);
  const DeviceGuard guard(features[0].get_device_index());
  const int64_t channels = features[0].size(1), height = sampling.out_height, width = sampling.out_width;
  // The convolutions behind this want the layout of the features.
  const Tensor output = is_channels_last(features[0])
      ? torch::stable::permute(torch::stable::new_empty(features[0], {rois.size(0), height, width, channels}), {0, 3, 1, 2})
      : torch::stable::new_empty(features[0], {rois.size(0), channels, height, width});
  if (output.numel() > 0 && !launch_forward_channels_last(features, rois, prob, sampling, output)) {
    launch_forward(features, rois, prob, sampling, output);
  }
  return output;
}

std::tuple<std::vector<Tensor>, Tensor> backward(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, bool need_features, bool need_prob,
    bool deterministic) {
  check_arguments(features, rois, prob, sampling);
  check_grad_output(grad_output, features[0], rois, sampling);
  const DeviceGuard guard(features[0].get_device_index());
  const bool empty = grad_output.numel() == 0;
  auto [grad_features, grad_prob] = make_gradients(features, prob, need_features, need_prob, empty);
  const bool scattered = !empty && need_features && !deterministic &&
      launch_backward_features_channels_last(grad_output, features, rois, prob, sampling, grad_features);
  if (!empty && need_features && !scattered) {
    launch_backward_features(grad_output, features, rois, prob, sampling, grad_features);
  }
  if (!empty && need_prob && prob.has_value() &&
      !launch_backward_prob_channels_last(grad_output, features, rois, prob, sampling, grad_prob)) {
    launch_backward_prob(grad_output, features, rois, prob, sampling, grad_prob);
  }
  return {grad_features, grad_prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsg, CUDA, library) {
  library.impl("sg_roi_align", TORCH_BOX(&forward_one<forward>));
  library.impl("multiscale_sg_roi_align", TORCH_BOX(&forward_many<forward>));
  library.impl("sg_roi_align_backward", TORCH_BOX(&backward_one<backward>));
  library.impl("multiscale_sg_roi_align_backward", TORCH_BOX(&backward_many<backward>));
}

}  // namespace dsg
