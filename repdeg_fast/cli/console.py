"""Where a command prints, and how it ends on a user's mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from repdeg_fast._checks import InputError

_WIDTH = 170  # columns that the widest table needs; a pipe has no width of its own


def stdout(least: int = 0) -> Console:
    """At least so wide: a terminal that is narrower breaks the lines of a table, but no figure is lost."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, least if console.is_terminal else _WIDTH))


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr, so that the tables on stdout can be piped."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text, steps=1: bar.update(task, advance=steps, description=escape(text))


@contextmanager
def clear_errors() -> Iterator[None]:
    """A user's mistake is one red line and exit code 2, not a traceback."""
    try:
        yield
    except (InputError, OSError) as error:  # such as a full disk
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
