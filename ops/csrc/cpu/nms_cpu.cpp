// Greedy suppression on the CPU: the boxes of each group by themselves, images side by side.

#include "../nms_arguments.h"
#include "suppression.h"

namespace dsg {
namespace {

template <typename scalar_t>
void run(const Tensor& boxes, const Tensor& groups, const Tensor& valid, double threshold, const Tensor& keep) {
  const int64_t batch = boxes.size(0), count = boxes.size(1);
  const auto* box = static_cast<const scalar_t*>(boxes.const_data_ptr());
  const auto* group = static_cast<const int64_t*>(groups.const_data_ptr());
  const auto* usable = static_cast<const bool*>(valid.const_data_ptr());
  auto* kept = static_cast<bool*>(keep.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t first = image * count;
      suppress_image(
          box + 4 * first, group + first, usable + first, count, static_cast<scalar_t>(threshold), kept + first);
    }
  });
}

Tensor batched_nms(const Tensor& boxes, const Tensor& groups, const Tensor& valid, double threshold) {
  check_nms_arguments(boxes, groups, valid);
  const Tensor keep = torch::stable::empty_like(valid);
  if (boxes.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(boxes, groups, valid, threshold, keep);
  } else {
    run<float>(boxes, groups, valid, threshold, keep);
  }
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsg, CPU, library) {
  library.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace dsg
