// Greedy suppression on CUDA, as torch calls it.
#include <torch/csrc/stable/accelerator.h>

#include "../nms_arguments.h"
#include "suppression.cuh"

namespace dsg {
namespace {

Tensor batched_nms(const Tensor& boxes, const Tensor& groups, const Tensor& valid, double threshold) {
  check_nms_arguments(boxes, groups, valid);
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const Tensor keep = torch::stable::empty_like(valid);
  const int64_t batch = boxes.size(0), count = boxes.size(1), words = words_of(count);
  if (batch * count == 0) {
    return keep;
  }
  STD_TORCH_CHECK(words <= kMostWords && batch <= kMostImages, "too many boxes for one suppression: ", count);
  const Tensor bits = torch::stable::new_empty(groups, {batch, count, words});
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    suppress(
        static_cast<const scalar_t*>(boxes.const_data_ptr()), static_cast<const int64_t*>(groups.const_data_ptr()),
        static_cast<const bool*>(valid.const_data_ptr()), batch, count, static_cast<scalar_t>(threshold),
        static_cast<Word*>(bits.mutable_data_ptr()), static_cast<bool*>(keep.mutable_data_ptr()),
        current_stream(boxes));
  };
  if (boxes.scalar_type() == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
  check_launch("suppression");
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsg, CUDA, library) {
  library.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace dsg
