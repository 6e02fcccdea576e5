"""What networks weigh: parameters and arithmetic, measured without making a tensor.

`costs.json` holds what `measure` found for every preset, so that listing them takes no time; a test holds both
together.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dsg.model.network.batch import padded_size
from dsg.model.network.build import build
from dsg.model.network.presets import presets

PICTURE = (800, 1333)
"""(height, width) that arithmetic is counted for, with the preset's own number of proposals and 100 detections."""
_TABLE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Cost:
    """Of one preset with 80 classes."""

    parameters: int
    """Frozen batch norms uncounted."""
    gflops: float
    """Billions of multiply-adds of one picture of 800 x 1333, a multiply-add counted once as this field does."""


SWITCHES = ("mrpn", "fuse_mask", "sgra_box", "fuse_box", "sgra_mask")
TABLE_1 = (0, 1, 2, 3, 4, 5)
"""How many of the switches are on in the rows of the paper's Table 1, one more each."""


@cache
def known_costs() -> Mapping[str, Cost]:
    """By preset."""
    return {name: Cost(**cost) for name, cost in _table()["presets"].items()}


@cache
def table_1() -> Sequence[Cost]:
    """Of the rows of the paper's Table 1, R-50."""
    return [Cost(**cost) for cost in _table()["table_1"]]


def measure(name: str, **overrides: Any) -> Cost:
    """Build the preset and run it without numbers.

    Args:
        overrides: as `build` takes them.
    """
    height, width = padded_size(*PICTURE)
    with torch.device("meta"), torch.no_grad():
        model = build(name, **overrides).eval()
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable})
        with counter:
            model.infer(torch.empty(1, 3, height, width), torch.empty(1, 2, dtype=torch.int64))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, round(counter.get_total_flops() / 2e9, 1))


def measure_all() -> Path:
    """Measure every preset and every row of Table 1, and replace the table."""
    costs = {name: asdict(measure(name)) for name in presets()}
    rows = [asdict(measure("mask_rcnn_r50_fpn", **dict.fromkeys(SWITCHES[:on], True))) for on in TABLE_1]
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(cost)}" for name, cost in costs.items())
    last = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    _TABLE.write_text(f'{{\n  "presets": {{\n{lines}\n  }},\n  "table_1": [\n{last}\n  ]\n}}\n', encoding="utf-8")
    return _TABLE


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return table


def _deformable(_: torch.Size, weight: torch.Size, *rest: Any, out_shape: torch.Size, **options: Any) -> int:
    """Two for each multiply-add, as PyTorch counts convolutions; the sampling itself is left out."""
    return 2 * out_shape.numel() * weight[1] * weight[2] * weight[3]
