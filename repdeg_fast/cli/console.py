"""Where a command prints, and how it ends on a user's mistake."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from repdeg_fast._checks import InputError

_WIDEST = 170  # columns that the widest table needs
_SPELT = {
    "–": "-",
    "−": "-",
    "…": "...",
    "‖": "|",
    "×": "x",
    "÷": "/",
    "·": "-",
    "≥": ">=",
    "→": "->",
    "²": "^2",
    "σ": "s",
    "Σ": "S",
    "µ": "u",
    "≤": "<=",
}


def stdout(wide: bool = False) -> Console:
    """As wide as the terminal, or as ``COLUMNS`` says; ``wide``: enough for the widest table, whose lines a narrower
    terminal breaks, but no figure is lost."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, _WIDEST)) if wide else console


def spell_out() -> None:
    """What the encoding of a stream lacks (``PYTHONIOENCODING=latin-1``) is spelt out: no run ends in its error."""
    codecs.register_error("repdeg_fast", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="repdeg_fast")


def _spelt(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_SPELT.get(one, "?") for one in error.object[error.start : error.end]), error.end


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
