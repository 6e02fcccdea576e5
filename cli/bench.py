"""`dsg bench`: figures for bench/results."""

from pathlib import Path
from typing import Annotated

import typer

from dsg.cli.loading import DeviceOption


def ops(
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    repeats: Annotated[int, typer.Option(help="Measurements of each case; the median counts.", min=1)] = 20,
    device: DeviceOption = None,
) -> None:
    """Time dsg.ops against torchvision and pycocotools in one run."""
    import torch

    from dsg.bench import report
    from dsg.bench.ops import run
    from dsg.ops import kernel_name

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report.commit()  # an unknown commit should show before the measuring, not after
    typer.echo(f"{report.device_name(chosen)}; {kernel_name()}", err=True)
    rows = run(chosen, repeats, on_case=lambda case: typer.echo(case, err=True))
    report.write(out, rows, chosen)
    for row in rows:
        typer.echo(f"{row.value:10.3f} {row.unit}  baseline {row.baseline:10.3f}  x{row.ratio:<6} {row.case}")
