"""Anchors: boxes of a few sizes and shapes at every cell of every pyramid level. A anchors a cell."""

import torch
from torch import Tensor, nn


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
            base = self._base(sizes, self.centre * nominal, dtype, device)  # [A, 4]
            anchors.append((shifts[:, :, None] + base).reshape(-1, 4))  # [Hf * Wf * A, 4]
        return anchors

    def _base(self, sizes: tuple[float, ...], centre: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Anchors of the cell at the origin, Tensor[A, 4], ratios outermost."""
        root = torch.tensor(self.ratios, dtype=dtype, device=device).sqrt()
        size = torch.tensor(sizes, dtype=dtype, device=device)
        heights = (root[:, None] * size).flatten()  # [A]
        widths = ((1 / root)[:, None] * size).flatten()  # [A]
        base = torch.stack([-widths, -heights, widths, heights], dim=1) / 2 + centre
        return base.round() if self.rounding else base
