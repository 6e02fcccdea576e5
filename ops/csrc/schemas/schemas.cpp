// What the ops of torch.ops.dsg take and give, for programs without Python; there ops/_register.py says the same.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dsg, library) {
  library.def(
      "sg_roi_align(Tensor features, Tensor rois, Tensor? prob, SymInt output_height, SymInt output_width, "
      "float spatial_scale, int sampling_ratio, bool aligned) -> Tensor");
  library.def(
      "multiscale_sg_roi_align(Tensor[] features, Tensor rois, Tensor? prob, SymInt output_height, "
      "SymInt output_width, float[] spatial_scales, int sampling_ratio, bool aligned, float canonical_scale, "
      "int canonical_level) -> Tensor");
  library.def("batched_nms(Tensor boxes, Tensor groups, Tensor valid, float iou_threshold) -> Tensor");
}
