"""`dsg bench`: figures for bench/results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsg.cli.loading import DEFAULT_MODEL, DeviceOption, ModelOption, PrecisionOption, ProposalsOption
from dsg.cli.progress import progress

if TYPE_CHECKING:
    from dsg.bench.report import Row

_LEAST_SIDE = 64  # pixels of a picture to train on, so that the made-up objects have some


def ops(
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    repeats: Annotated[int, typer.Option(help="Measurements of each case; the median counts.", min=1)] = 20,
    device: DeviceOption = None,
) -> None:
    """Time dsg.ops against torchvision and pycocotools in one run."""
    from dsg.bench import report
    from dsg.bench.ops import run
    from dsg.model.network.eager import present_device
    from dsg.ops import kernel_name

    chosen = present_device(device)
    report.commit()  # an unknown commit should show before the measuring, not after
    typer.echo(f"{report.device_name(chosen)}; {kernel_name()}", err=True)
    rows = run(chosen, repeats, on_case=lambda case: typer.echo(case, err=True))
    report.write(out, rows, chosen)
    _show(rows)


def service(
    out: Annotated[Path, typer.Option(help="JSON file to write; a plot beside it.", show_default=False)],
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    seconds: Annotated[float, typer.Option(help="Time of each measurement.", min=0.5, max=120)] = 10,
    deadline_ms: Annotated[
        int | None,
        typer.Option(help="What an answer must keep to count as good; else ten times what one picture takes.", min=1),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch, of all servers.", min=1)] = 8,
    proposals: ProposalsOption = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of photos to send; else made up.", exists=True, file_okay=False)
    ] = None,
    beside: Annotated[
        Literal["all", "litserve", "plain", "nothing"], typer.Option(help="What is measured beside dsg serve.")
    ] = "all",
) -> None:
    """Put load on `dsg serve` on this machine, beside LitServe and a plain endpoint, in one run."""
    from dsg.bench import report
    from dsg.bench.service import run
    from dsg.bench.service_plot import draw
    from dsg.bench.service_processes import Setup
    from dsg.model.network.eager import present_device

    chosen = present_device(device)
    report.commit()  # an unknown commit should show before the measuring, not after
    peers = {"all": ["litserve", "plain"], "nothing": []}.get(beside, [beside])
    setup = Setup(model, str(chosen), max_batch, proposals)
    deadline_s = None if deadline_ms is None else deadline_ms / 1000
    figures = run(setup, deadline_s, seconds, peers, images, on_case=lambda case: typer.echo(case, err=True))
    report.write(out, figures.rows, chosen)
    what = Path(model).stem if proposals is None else f"{Path(model).stem}, {proposals} proposals"
    draw(out.with_suffix(".png"), figures, f"{what} on {report.device_name(chosen)}")
    _show(figures.rows)


def model(
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    name: Annotated[
        str, typer.Option("--model", help="A name that `dsg models` lists, or a checkpoint.")
    ] = DEFAULT_MODEL,
    formats: Annotated[
        str, typer.Option(help="Comma separated: eager, compiled, torchscript, onnx, onnx-body, aoti.")
    ] = "eager,compiled,torchscript,onnx,onnx-body,aoti",
    batch: Annotated[list[int] | None, typer.Option(help="Pictures in a batch; may be given again.", min=1)] = None,
    half: Annotated[bool, typer.Option("--half", help="Everything in float16.")] = False,
    prove: Annotated[
        bool, typer.Option("--prove/--no-proof", help="Leave out files that differ; not for networks untrained yet.")
    ] = True,
    repeats: Annotated[int, typer.Option(help="Measurements of each case; the median counts.", min=1)] = 20,
    device: DeviceOption = None,
) -> None:
    """Pictures a second of one network: eager, compiled, and from each exported file, side by side.

    The files are exported first, and proven. onnx-body runs the ONNX file without the native kernels of the op.
    """
    import torch

    from dsg.bench import report
    from dsg.bench.formats import Way, run
    from dsg.model.network.eager import present_device

    wanted = formats.split(",")
    unknown = sorted(set(wanted) - {way.value for way in Way})
    if unknown:
        raise ValueError(f"unknown format {', '.join(unknown)}; known are {', '.join(way.value for way in Way)}")
    chosen = present_device(device)
    report.commit()  # an unknown commit should show before the measuring, not after
    typer.echo(f"{report.device_name(chosen)}; torch {torch.__version__}", err=True)
    say = lambda line: typer.echo(line, err=True)  # noqa: E731
    rows = run(name, chosen, [Way(one) for one in wanted], batch or [1, 8], repeats, half, prove, say)
    report.write(out, rows, chosen)
    for row in rows:
        typer.echo(f"{row.value:10.2f} {row.unit}  x{row.ratio:<6} {row.case}")


def detector(
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    batch: Annotated[
        list[int] | None,
        typer.Option(help="On a GPU: pictures in a batch; may be given again.", show_default="1 and 16", min=1),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="On a CPU: a name of `dsg models`, or a checkpoint.", show_default=DEFAULT_MODEL),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="On a CPU: picture to show it; else a scene is made up.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each case; the median counts.", min=1)] = 20,
    device: DeviceOption = None,
) -> None:
    """From arrays to run lengths, whole and by stages, beside torchvision's Mask R-CNN to its masks.

    On a GPU: Mask R-CNN and DSG on ResNet-50, pictures of 800x1333. On a CPU: the default weights on one picture,
    beside torchvision's Mask R-CNN on the same backbone.
    """
    from dsg.bench import report
    from dsg.bench.detector import run, run_on_cpu
    from dsg.model.network.eager import present_device

    chosen = present_device(device)
    on_gpu = chosen.type == "cuda"
    if not on_gpu and batch:
        raise ValueError("--batch is for a GPU; on a CPU one picture is measured")
    if on_gpu and (model or picture):
        raise ValueError("--model and --picture are for a CPU; on a GPU networks on ResNet-50 are measured")
    report.commit()  # an unknown commit should show before the measuring, not after
    say = lambda line: typer.echo(line, err=True)  # noqa: E731
    if on_gpu:
        rows = run(chosen, batch or [1, 16], repeats, on_case=say)
    else:
        rows = run_on_cpu(model or DEFAULT_MODEL, picture, repeats, on_case=say)
    report.write(out, rows, chosen)
    _show(rows)


def train(
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A preset; may be given again.", show_default="dsg_r50_fpn and mask_rcnn_r50_fpn"),
    ] = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Height and width of the pictures.")] = "800x1216",
    batch: Annotated[int, typer.Option(help="Pictures of a step.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Steps that are measured; the median counts.", min=1)] = 20,
    device: DeviceOption = None,
) -> None:
    """Images a second, stages and memory of training steps, beside torchvision's Mask R-CNN on ResNet-50."""
    from dsg.bench import report
    from dsg.bench.training import MODELS, run
    from dsg.model.network.eager import present_device
    from dsg.model.network.presets import preset_config

    sides = size.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) >= _LEAST_SIDE for side in sides):
        raise ValueError(f"--size is HEIGHTxWIDTH, each at least {_LEAST_SIDE}, such as 800x1216, not {size}")
    for name in model or MODELS:
        preset_config(name)  # an unknown one should show before the measuring, not after
    chosen = present_device(device)
    report.commit()
    say = lambda line: typer.echo(line, err=True)  # noqa: E731
    rows = run(chosen, model or MODELS, (int(sides[0]), int(sides[1])), batch, repeats, on_case=say)
    report.write(out, rows, chosen)
    _show(rows)


def precision(
    annotations: Annotated[Path, typer.Option(help="What is right: a COCO file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures.", show_default="images/ beside the annotations")
    ] = None,
    model: Annotated[str, typer.Option(help="A name that `dsg models` lists, or a checkpoint.")] = DEFAULT_MODEL,
    fast: PrecisionOption = "auto",
    proposals: Annotated[
        list[int] | None,
        typer.Option(
            help="Another number of proposals to measure; may be given again.",
            show_default="300 where the network has more",
            min=1,
        ),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that --out has already.")] = False,
    device: DeviceOption = None,
) -> None:
    """What the fast path costs: AP beside float32, and how many detections are found again."""
    from dsg.bench import report
    from dsg.bench.precision import run
    from dsg.model.network.eager import present_device

    chosen = present_device(device)
    report.commit()  # an unknown commit should show before the measuring, not after
    with progress("pictures") as advance:
        rows = run(
            model,
            annotations,
            images,
            chosen,
            fast,  # type: ignore[arg-type]  # a text is checked there
            proposals or (),
            on_case=lambda case: typer.echo(case, err=True),
            on_picture=advance,
        )
    report.write(out, rows, chosen, add=add)
    _show(rows)


def systems(
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Annotations to train on; repeat to join.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; its stem is the name.", show_default=False)],
    images: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="Folder of each file's pictures.")] = None,
    val: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Annotations to measure AP on.")] = None,
    val_images: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="Folder of their pictures.")] = None,
    init: Annotated[str | None, typer.Option(help="Weights that every system starts from, as in dsg train.")] = None,
    config: Annotated[str, typer.Option(help="Recipe.")] = "systems_organoids",
    backbone: Annotated[str, typer.Option(help="Backbone in the presets' names.")] = "lite0",
    system: Annotated[
        list[str] | None, typer.Option(help="A system, such as 'Cascade DSG'; repeat.", show_default="all of them")
    ] = None,
    side_by_side: Annotated[int, typer.Option(help="Runs at once on the device.", min=1)] = 4,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of every system's run; repeat.", show_default="0")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not repeated.")] = Path(
        "runs/systems"
    ),
    pictures: Annotated[
        Path | None,
        typer.Option(help="PNG file to draw: masks of the fullest pictures by each system of the first seed."),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that --out has already.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in dsg train, for every run.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Train every system alike and compare their AP: Mask R-CNN, DSG, the cascades, HTC, DSC, Mask Scoring, PANet."""
    from dsg.bench import report
    from dsg.bench.pictures import draw_runs
    from dsg.bench.systems import chosen, compare, planned, train
    from dsg.model.network.eager import present_device

    if pictures is not None and not val:
        raise ValueError("--pictures shows pictures of --val: give it")
    plan = planned(chosen(system or []), seed or [0], runs)
    place = present_device(device)
    report.commit()
    options = ["--config", config]
    for flag, values in (
        ("--data", data),
        ("--images", images),
        ("--val", val),
        ("--val-images", val_images),
        ("--set", settings),
    ):
        for value in values or []:
            options += [flag, str(value)]
    options += ["--init", init] if init else []
    options += ["--device", device] if device else []
    say = lambda line: typer.echo(line, err=True)  # noqa: E731
    train(plan, options, backbone=backbone, side_by_side=side_by_side, say=say)
    rows = compare(plan, Path(config).stem)
    report.write(out, rows, place, add=add)
    for row in rows:
        typer.echo(f"{row.value:7.2f}  {row.value - row.baseline:+6.2f}  {row.case}")
    if pictures is not None:
        first = {run.system.name: run.best for run in plan if run.seed == plan[0].seed}
        draw_runs(first, val or [], val_images or [], pictures, str(place))


def _show(rows: "list[Row]") -> None:
    for row in rows:
        typer.echo(f"{row.value:10.3f} {row.unit}  baseline {row.baseline:10.3f}  x{row.ratio:<6} {row.case}")
