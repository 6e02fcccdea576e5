"""Functions on tensors: the shape-guided RoI features and COCO mask encoding. No parameters, no config.

Where torch is not installed, only the modules that need none can be used: `rle`, `windows`, `array_masks`.
"""

from importlib.util import find_spec

if __name__ != "dsg.ops":
    raise ImportError(f"import this as dsg.ops, not {__name__}: a second copy would register the op twice")

if find_spec("torch") is not None:
    import torch

    from dsg.ops.diagnosis import torch_problem

    if _problem := torch_problem(torch.__version__):
        raise ImportError(_problem, name="torch")
    from dsg.ops._load import kernel_name
    from dsg.ops.masks import encode_masks, paste_masks
    from dsg.ops.nms import batched_nms
    from dsg.ops.sg_roi_align import MultiScaleSgRoIAlign, SgRoIAlign, multiscale_sg_roi_align, sg_roi_align

__all__ = [
    "MultiScaleSgRoIAlign",
    "SgRoIAlign",
    "batched_nms",
    "encode_masks",
    "kernel_name",
    "multiscale_sg_roi_align",
    "paste_masks",
    "sg_roi_align",
]
