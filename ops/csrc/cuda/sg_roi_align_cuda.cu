// SgRoIAlign on CUDA: the ops, in terms of the launches.
#include "pyramid.cuh"

#include <torch/csrc/stable/accelerator.h>

namespace dsg {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor forward(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling) {
  check_arguments(features, rois, prob, sampling);
  const DeviceGuard guard(features[0].get_device_index());
  const Tensor output = torch::stable::new_empty(
      features[0], {rois.size(0), features[0].size(1), sampling.out_height, sampling.out_width});
  if (output.numel() > 0) {
    launch_forward(features, rois, prob, sampling, output);
  }
  return output;
}

std::tuple<std::vector<Tensor>, Tensor> backward(
    const Tensor& grad_output, const std::vector<Tensor>& features, const Tensor& rois,
    const std::optional<Tensor>& prob, const Sampling& sampling, bool need_features, bool need_prob,
    bool /*deterministic*/) {
  check_arguments(features, rois, prob, sampling);
  check_grad_output(grad_output, features[0], rois, sampling);
  const DeviceGuard guard(features[0].get_device_index());
  const bool empty = grad_output.numel() == 0;
  auto [grad_features, grad_prob] = make_gradients(features, prob, need_features, need_prob, empty);
  if (!empty && need_features) {
    launch_backward_features(grad_output, features, rois, prob, sampling, grad_features);
  }
  if (!empty && need_prob && prob.has_value()) {
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
