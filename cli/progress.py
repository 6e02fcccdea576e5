"""How far long work has come: a bar on a terminal, a line now and then elsewhere. All on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

_LINES = 10  # how many lines a whole run prints where there is no terminal


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with (done, total) after each piece of the work.

    Args:
        what: the pieces, in the plural ("pictures").
    """
    if not sys.stderr.isatty():
        yield lambda done, total: _line(what, done, total)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line(what: str, done: int, total: int) -> None:
    if done % max(1, total // _LINES) == 0 or done == total:
        typer.echo(f"{done} of {total} {what}", err=True)
