"""Functions on tensors: the shape-guided RoI features and COCO mask encoding. No parameters, no config."""

if __name__ != "dsg.ops":
    raise ImportError(f"import this package as dsg.ops, not {__name__}: a second copy would register the op twice")

from dsg.ops._load import kernel_name
from dsg.ops.sg_roi_align import MultiScaleSgRoIAlign, SgRoIAlign, multiscale_sg_roi_align, sg_roi_align

__all__ = ["MultiScaleSgRoIAlign", "SgRoIAlign", "kernel_name", "multiscale_sg_roi_align", "sg_roi_align"]
