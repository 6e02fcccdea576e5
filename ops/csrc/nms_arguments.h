// What both NMS kernels are given, checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace dsg {

using torch::stable::Tensor;

// boxes [B, N, 4] by falling score, groups int64 [B, N], valid bool [B, N].
inline void check_nms_arguments(const Tensor& boxes, const Tensor& groups, const Tensor& valid) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be [B, N, 4]");
  STD_TORCH_CHECK(
      boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double,
      "boxes must be float32 or float64");
  STD_TORCH_CHECK(groups.scalar_type() == ScalarType::Long, "groups must be int64");
  STD_TORCH_CHECK(valid.scalar_type() == ScalarType::Bool, "valid must be bool");
  for (const Tensor& tensor : {groups, valid}) {
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == boxes.size(0) && tensor.size(1) == boxes.size(1),
        "groups and valid must be [B, N], as the boxes are");
    STD_TORCH_CHECK(tensor.device() == boxes.device(), "boxes, groups and valid are on several devices");
    STD_TORCH_CHECK(tensor.is_contiguous(), "groups and valid must be contiguous");
  }
  STD_TORCH_CHECK(boxes.is_contiguous(), "boxes must be contiguous");
}

}  // namespace dsg
