"""The graph that all formats are made from, and the example that it is recorded with.

B images in a batch, H and W their size.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsg.export.contract import OUTPUTS
from dsg.model.network.detector import Detector
from dsg.model.network.norm import fold_norms
from dsg.model.network.sizes import padded_size

_MOST_IMAGES = 1024
# Below 65 the coarsest pyramid level has one cell, for which PyTorch's shape rules know other cases. The files take
# smaller pictures all the same; a graph is merely not recorded for them.
_SIDES = (65, 16384)
_TRACED_SIZES = ((96, 128), (90, 120))


class ExportGraph(nn.Module):
    """Images and sizes in, padded detections out; see `contract.INPUTS` and `contract.OUTPUTS`.

    A copy of the detector for deployment alone: norms are folded into convolutions, and there are no gradients. Sides
    need not be multiples of 32: the graph pads to them.

    Args:
        detector: in eval mode; it is left as it is.
        half: compute in float16; boxes and scores stay float32, and so do inputs and outputs.
        channels_last: lay weights, and with them features, out as PyTorch's convolutions and SgRoIAlign are quickest.
            Not for `record` in half precision: of a cast to float32 and back torch.export asks how strides divide each
            other, which it cannot prove for all widths.
    """

    def __init__(self, detector: Detector, half: bool, channels_last: bool = False) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).eval().requires_grad_(False)
        fold_norms(self.detector)
        self.detector.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self._half = half
        if half:
            self.detector.half()

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """images float32 [B, 3, H, W], sizes int64 [B, 2] -> the tensors of `contract.OUTPUTS`."""
        padded = pad_images(images)
        found = self.detector.infer(padded.half() if self._half else padded, sizes)
        assert found._fields == tuple(OUTPUTS)
        return tuple(found)


def pad_images(images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 3, H', W']
    """Zeros on the right and below, up to sides that are multiples of 32."""
    height, width = images.shape[-2:]
    full_height, full_width = padded_size(height, width)
    return functional.pad(images, (0, full_width - width, 0, full_height - height))


def example(device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch to record with: two pictures, one smaller than the other."""
    height, width = _TRACED_SIZES[0]
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return images.to(device), torch.tensor(_TRACED_SIZES, device=device)


def record(graph: ExportGraph, device: torch.device) -> torch.export.ExportedProgram:
    """The graph as torch.export sees it, for batches and pictures of every size."""
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    height, width = (torch.export.Dim(name, min=_SIDES[0], max=_SIDES[1]) for name in ("height", "width"))
    with torch.no_grad():
        return torch.export.export(
            graph.to(device),
            example(device),
            dynamic_shapes={"images": {0: batch, 2: height, 3: width}, "sizes": {0: batch}},
        )
