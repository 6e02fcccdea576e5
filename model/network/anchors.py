"""Anchors: boxes of a few sizes and shapes at every cell of every pyramid level. A anchors a cell."""

from typing import Any

import torch
from torch import Tensor, nn

from dsg.model.network.constants import constant
from dsg.model.network.tracing import is_traced

_MOST_KNOWN = 16  # sizes of batches whose anchors are kept, some 5 MB each


class AnchorGenerator(nn.Module):
    """Boxes centred on the top left corner of each cell, or elsewhere in it.

    Args:
        sizes: square roots of areas, pixels, per level.
        ratios: heights over widths.
        rounding: whole-pixel base anchors, as torchvision has them.
        centre: where in its cell a box is centred, in cells: 0 the top left corner, 0.5 the middle.
        strides_from_grid: stride = padded size // grid size, as torchvision has it, instead of 4, 8, 16, ...
    """

    def __init__(
        self,
        sizes: tuple[tuple[float, ...], ...],
        ratios: tuple[float, ...],
        rounding: bool,
        strides_from_grid: bool,
        centre: float = 0.0,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.ratios = ratios
        self.rounding = rounding
        self.strides_from_grid = strides_from_grid
        self.centre = centre
        self.per_cell = len(sizes[0]) * len(ratios)
        self._known: dict[Any, list[Tensor]] = {}

    def forward(self, levels: list[Tensor], padded_size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Anchors of each level.

        Args:
            levels: features [B, C, Hf, Wf], finest first, the first at stride 4.
            padded_size: (height, width) of the batch.
            dtype: of the features; the boxes are float32 where it is narrower.

        Returns:
            a Tensor[Hf * Wf * A, 4] a level, rows in the order (row, column, size and ratio).
        """
        dtype = torch.promote_types(dtype, torch.float32)  # half precision holds no pixel coordinate above 2048 exactly
        if is_traced() or torch.compiler.is_compiling():  # sizes are no numbers there
            return self._anchors(levels, padded_size, dtype)
        # The same for every batch of these sizes, and a hundred small launches on a GPU.
        key = (tuple(level.shape[-2:] for level in levels), padded_size, dtype, levels[0].device)
        found = self._known.pop(key, None)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # training may come upon them later
                found = self._anchors(levels, padded_size, dtype)
        self._known[key] = found
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]  # the one that was not wanted for longest
        return found

    def _anchors(self, levels: list[Tensor], padded_size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        anchors = []
        for number, (features, sizes) in enumerate(zip(levels, self.sizes, strict=True)):
            rows, columns = features.shape[-2:]
            nominal = 4 * 2**number
            stride_y = padded_size[0] // rows if self.strides_from_grid else nominal
            stride_x = padded_size[1] // columns if self.strides_from_grid else nominal
            device = features.device
            y = torch.arange(rows, device=device).to(dtype) * stride_y  # [Hf]
            x = torch.arange(columns, device=device).to(dtype) * stride_x  # [Wf]
            shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)  # [Hf, Wf, 4]
            base = self._base(sizes, self.centre * nominal, y)  # [A, 4]
            anchors.append((shifts[:, :, None] + base).reshape(-1, 4))  # [Hf * Wf * A, 4]
        return anchors

    def _base(self, sizes: tuple[float, ...], centre: float, like: Tensor) -> Tensor:
        """Anchors of the cell at the origin, Tensor[A, 4], ratios outermost; dtype and device are those of `like`."""
        root = constant(self.ratios, like).sqrt()
        size = constant(sizes, like)
        heights = (root[:, None] * size).flatten()  # [A]
        widths = ((1 / root)[:, None] * size).flatten()  # [A]
        base = torch.stack([-widths, -heights, widths, heights], dim=1) / 2 + centre
        return base.round() if self.rounding else base
