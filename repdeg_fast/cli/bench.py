"""``repdeg-fast bench``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from repdeg_fast._checks import InputError
from repdeg_fast.bench import overhead as host_time
from repdeg_fast.bench import plots, report, runner
from repdeg_fast.bench.suite import Selection, select
from repdeg_fast.cli import options, outputs
from repdeg_fast.cli.console import progress, stdout
from repdeg_fast.cli.options import Cases, Device, Dtype, Ops, Providers, Weights


def bench(
    ops: Ops = "",
    cases: Cases = "",
    providers: Providers = "",
    device: Device = "",
    dtype: Dtype = "",
    weights: Weights = "",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file, after each case.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots (PNG) into this folder.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each provider and pass of a case, about.")] = 0.5,
    full: Annotated[
        bool, typer.Option("--full", metavar="", help="All cases that suit the device, not one for each operation.")
    ] = False,
    wide: Annotated[bool, typer.Option("--wide", metavar="", help="Every column, for 170 columns.")] = False,
    listing: Annotated[
        bool,
        typer.Option("--list", metavar="", help="Show the operations, their cases and providers, and measure nothing."),
    ] = False,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead", metavar="", help="What a call costs the host beside its kernels, for every operation."
        ),
    ] = False,
) -> None:
    """Measure operations against their peers, side by side: time, share of the roof, memory, and the value."""
    if listing:
        stdout().print(options.catalogue())
        return
    target = options.device_of(device)
    if not math.isfinite(seconds):
        raise InputError(f"seconds: got {seconds}; expected a finite number")
    if overhead:
        stdout().print(host_time.table(list(host_time.measure(target, seconds)), target))
        return
    if json:
        outputs.check_file("json", json)
    if plot:
        outputs.check_folder("plot", plot)
        plots.pyplot()  # a missing matplotlib must not show after minutes of measuring
    selections = options.with_weights(
        select(options.names(ops), options.names(cases), options.names(providers), target, bool(weights), full),
        weights,
        cases,
    )
    selections = [options.with_dtype(selection, dtype) for selection in selections]
    console = stdout(wide)
    rows = _run(selections, target, seconds, json, console, wide)
    console.print(report.summary(rows))
    report.print_notes(console, rows, wide)
    for op in dict.fromkeys(row.suite.op for row in rows) if plot else ():
        for path in plots.plot_run([row for row in rows if row.suite.op == op], plot or Path()):
            console.print(f"plot: {path}", soft_wrap=True, markup=False)
    if json:
        console.print(f"figures: {json}", soft_wrap=True, markup=False)
    if any(row.wrong or (row.failed and row.provider.ours) for row in rows):
        raise typer.Exit(1)


def _run(
    selections: list[Selection],
    device: torch.device,
    seconds: float,
    json: Path | None,
    console: Console,
    wide: bool,
) -> list[runner.Row]:
    rows = []
    with progress(sum(runner.count_ticks(s.cases, s.providers) for s in selections)) as tick:
        for selection in selections:
            for found in runner.run(selection.suite, selection.cases, selection.providers, device, seconds, tick):
                rows += found
                if found[0].case.group is None:
                    console.print(report.table(found, wide), end="\n\n")
                if json:
                    report.write_json(rows, json)
            for group in dict.fromkeys(case.group for case in selection.cases if case.group):
                of_group = [row for row in rows if (row.suite, row.case.group) == (selection.suite, group)]
                console.print(report.sweep_table(of_group), end="\n\n")
    return rows
