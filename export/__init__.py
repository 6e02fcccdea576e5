"""From a trained model to what runs it: the one door through which service and command line get a Predictor.

Today that is a checkpoint, run by PyTorch. Files for other runtimes (ONNX, TorchScript, AOTInductor) belong here.
"""

from dsg.export.loading import load

__all__ = ["load"]
