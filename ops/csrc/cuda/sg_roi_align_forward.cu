// SgRoIAlign on CUDA, forward: the launch of the kernel that takes every layout.
#include "forward_kernel.cuh"

namespace dsg {

void launch_forward(
    const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& prob,
    const Sampling& sampling, const Tensor& output) {
  dispatch_floating(features[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto call = make_call<accumulate_t<scalar_t>>(features, rois, prob, sampling);
    const auto pyramid = pyramid_of<const scalar_t>(features);
    const auto target = image4_of<scalar_t>(output);
    const int64_t total = output.numel();
    const cudaStream_t stream = current_stream(output);
    if (features[0].stride(1) == 1) {
      forward_kernel<scalar_t, true><<<blocks_for(total), kThreads, 0, stream>>>(call, pyramid, target, total);
    } else {
      forward_kernel<scalar_t, false><<<blocks_for(total), kThreads, 0, stream>>>(call, pyramid, target, total);
    }
    check_launch("forward");
  });
}

}  // namespace dsg
