"""``repdeg-fast profile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from repdeg_fast.bench import plots
from repdeg_fast.bench.profile import Profile, file_name, profile_case
from repdeg_fast.bench.report import format_bytes, plain_table
from repdeg_fast.bench.suite import Case, Suite, select, suites
from repdeg_fast.cli import options, outputs
from repdeg_fast.cli.console import progress, stdout
from repdeg_fast.cli.options import Device, Dtype, Providers, Weights


def profile(
    op: Annotated[str, typer.Option(help=f"The operation: {', '.join(suites())}.")],
    case: Annotated[str, typer.Option(help="Default: the first. `bench --list` shows all.", show_default=False)] = "",
    provider: Providers = "",
    device: Device = "",
    dtype: Dtype = "",
    weights: Weights = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the plot and snapshots.")] = Path("bench_out"),
) -> None:
    """Show where the memory of one step goes: a table by phase, and a timeline of the allocated bytes (PNG).

    On CUDA also one snapshot a provider for PyTorch's memory viewer (https://pytorch.org/memory_viz).
    """
    target = options.device_of(device)
    outputs.check_folder("out", out)
    plots.pyplot()
    selections = options.with_weights(
        select([op], options.names(case), options.names(provider), target, bool(weights)), weights, case
    )
    selection = options.with_dtype(selections[0], dtype)
    out.mkdir(parents=True, exist_ok=True)
    console = stdout()
    for chosen in selection.cases if case or weights else selection.cases[:1]:
        with progress(len(selection.providers)) as tick:
            profiles = profile_case(selection.suite, chosen, selection.providers, target, out, tick)
        console.print(_table(selection.suite, chosen, profiles, target))
        timelines = {p.provider.name: p.timeline for p in profiles if p.timeline}
        if timelines:
            path = out / f"{op}-{file_name(chosen.name)}-timeline.png"
            title = f"{op}: bytes beyond the inputs on {target.type}\n{chosen}"
            console.print(f"timeline: {plots.plot_timelines(timelines, title, path)}", soft_wrap=True, markup=False)
        for found in profiles:
            if found.snapshot:
                console.print(f"snapshot: {found.snapshot}", soft_wrap=True, markup=False)


def _table(suite: Suite, case: Case, profiles: Sequence[Profile], device: torch.device) -> Table:
    title = f"{suite.op} · {case} on {device.type}: memory beyond the inputs"
    notes = [f"not measured: {p.provider.name}: {p.reason}" for p in profiles if p.timeline is None]
    notes += [
        f"{p.provider.name} adds to the gradient that is there: both passes in one call"
        for p in profiles
        if p.provider.graph_free and p.timeline
    ]
    out = plain_table(title, escape("\n".join(notes)))
    out.add_column("provider", no_wrap=True)
    for name in ("forward peak", "saved for backward", "held after forward", "backward peak", "held after"):
        out.add_column(name, justify="right")
    for profile in profiles:
        name, timeline = profile.provider.name, profile.timeline
        if timeline is None:
            continue
        first = next(iter(timeline.phases))  # forward; or both passes, where one call does them
        backward = "backward" in timeline.phases
        out.add_row(
            name,
            format_bytes(timeline.peak(first)),
            "–" if profile.provider.graph_free else format_bytes(profile.saved),
            format_bytes(timeline.at(timeline.phases[first][1])),
            format_bytes(timeline.peak("backward")) if backward else "–",
            format_bytes(timeline.points[-1][1] if timeline.points else 0),
            style="bold" if profile.provider.ours else None,
        )
    return out
