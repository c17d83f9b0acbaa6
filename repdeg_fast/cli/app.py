"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from repdeg_fast import __version__, backends
from repdeg_fast.cli.analyze import analyze
from repdeg_fast.cli.bench import bench
from repdeg_fast.cli.console import clear_errors
from repdeg_fast.cli.info import info
from repdeg_fast.cli.inspect import inspect
from repdeg_fast.cli.profile import profile
from repdeg_fast.cli.tune import tune

app = typer.Typer(
    help="Fused kernels for language-model pretraining: measure their speed and memory, and look at embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"repdeg-fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    with clear_errors():
        backends.check_requested()


_BENCH_EPILOG = "Exits with 1 if a value is wrong or one of our own providers fails, with 2 on bad input."
app.command(epilog=_BENCH_EPILOG)(clear_errors()(bench))
for command in (profile, tune, inspect, analyze, info):
    app.command()(clear_errors()(command))
