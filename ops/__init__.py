"""Functions on tensors: the shape-guided RoI features and COCO mask encoding. No parameters, no config."""

if __name__ != "dsg.ops":
    raise ImportError(f"import this package as dsg.ops, not {__name__}: a second copy would register the op twice")
