"""Where the native kernels of the shape-guided op lie for onnxruntime, once `make onnx-ops` has built them."""

from pathlib import Path

OP_LIBRARY = Path(__file__).parents[1] / "ops" / "_C_onnxruntime.so"
"""Where the file is not there, the op's body in the model runs."""
