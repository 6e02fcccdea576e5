"""Entry point of the `dsg` command."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from dsg.cli import bench, data, errors, evaluate, export, import_weights, models, predict, pull, serve, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("models")(models.models)
app.command("serve")(serve.serve)
app.command("predict")(predict.predict)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("import-weights")(import_weights.import_weights)
app.command("pull")(pull.pull)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at annotation files.")
data_app.command("check")(data.check)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure, for bench/results.")
bench_app.command("ops")(bench.ops)
bench_app.command("service")(bench.service)
bench_app.command("model")(bench.model)
bench_app.command("detector")(bench.detector)
bench_app.command("train")(bench.train)
bench_app.command("precision")(bench.precision)
bench_app.command("systems")(bench.systems)
app.add_typer(bench_app, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dsg {version('dsg')}")
        raise typer.Exit


@app.callback()
def dsg(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Deeply Shape-guided instance segmentation: train, evaluate and serve."""


def run(arguments: list[str]) -> int:
    """Run one command line.

    Args:
        arguments: what follows `dsg`.

    Returns:
        exit code: 0 success, 2 a mistake of the user, 1 a fault of ours, 130 interrupted.
    """
    try:
        return app(arguments, prog_name="dsg", standalone_mode=False) or errors.OK
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error)


def main() -> None:
    """What the console script calls."""
    sys.exit(run(sys.argv[1:]))
