"""The rows of a run as tables for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repdeg_fast.bench.gpu_timing import GRAPH
from repdeg_fast.bench.measure import speedup
from repdeg_fast.bench.runner import Row
from repdeg_fast.bench.suite import dtype_name

_VALUE_WIDTH = 15  # characters of a value with 12 decimals
_MARKS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def write_json(rows: Sequence[Row], path: Path) -> None:
    write_rows([row.as_json() for row in rows], path)


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Replaced as a whole: whoever reads it while a run goes on, or after one was killed, finds it complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(draft, path)


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case; below it our speedups, and who was not measured and why."""
    first = rows[0]
    with_tokens = first.case.tokens is not None
    with_host = any(row.host_us is not None for row in rows)
    title = f"{first.suite.op} · {first.case} on {first.device}"
    exact = [] if first.exact is None else [f"{first.suite.value_name} in float64 = {first.exact:.12f}"]
    facts = [*exact, *_verdicts(rows), *_timed_otherwise(rows)]
    caption = "\n".join([escape("\n".join(facts)), *_left_out(rows)])
    out = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    out.add_column("provider", no_wrap=True)
    out.add_column("pass", no_wrap=True)
    out.add_column("ms (p20–p80)", justify="right", no_wrap=True)
    sometimes = ["host µs"] * with_host + ["tokens/s"] * with_tokens
    for name in (*sometimes, "GB/s", "TFLOP/s", "% roof", "peak", "saved"):
        out.add_column(name, justify="right", no_wrap=True)
    floor = next((row.provider.name for row in rows if row.times_floor), None)
    for name in ("vs eager", "vs best rival", *([f"time ÷ {floor}"] if floor else [])):
        out.add_column(name, justify="right", width=9)
    out.add_column(first.suite.value_name, overflow="fold", min_width=_VALUE_WIDTH)
    for row in rows:
        if row.samples:
            style = "bold" if row.provider.ours else None
            out.add_row(*_figures(row, with_host, with_tokens, floor is not None), style=style)
    return out


def _left_out(rows: Sequence[Row]) -> list[str]:
    """A line for each provider without figures, once for all its passes."""
    left_out = [row for row in rows if not row.samples and row.pass_ == row.provider.passes[0]]
    return [f"not measured: {row.provider.name}: {_reason(row)}" for row in left_out]


def _timed_otherwise(rows: Sequence[Row]) -> list[str]:
    """Who on a GPU could not be timed as a graph is, and why."""
    return [
        f"timed with {row.timing}: {row.provider.name}, {row.pass_}"
        for row in rows
        if row.timing and not row.timing.startswith(GRAPH)
    ]


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """For each pass, our fastest provider against every rival, for example "forward: ours-cpu is 9.00× eager"."""
    lines = []
    for pass_ in dict.fromkeys(row.pass_ for row in rows):
        measured = [row for row in rows if row.pass_ == pass_ and row.samples]
        rivals = [row for row in measured if row.provider.rival]
        for graph_free in (False, True):
            ours = [row for row in measured if row.provider.ours and row.provider.graph_free is graph_free]
            if not ours or not rivals:
                continue
            best = min(ours, key=lambda row: row.ms or 0)
            device = torch.device(best.device)
            ratios = [(row.provider.name, speedup(row.samples, best.samples, device)) for row in rivals]
            lines.append(f"{pass_}: {best.provider.name} is " + ", ".join(f"{_times(r)} {name}" for name, r in ratios))
    return lines


def sweep_table(rows: Sequence[Row]) -> Table:
    """The cases of one group side by side, and the power of the size that the time of each provider grows with."""
    suite, group = rows[0].suite, rows[0].case.group
    cases = sorted({row.case for row in rows}, key=suite.size)
    title = f"{suite.op} · {group}: ms against {suite.size_label}, {dtype_name(cases[0].dtype)} on {rows[0].device}"
    caption = f"growth: p where the time grows like ({suite.size_label})^p, by least squares; 1 is linear"
    out = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    out.add_column("provider", no_wrap=True)
    out.add_column("pass", no_wrap=True)
    for case in cases:
        out.add_column(f"{suite.size(case):,}", justify="right")
    out.add_column("growth", justify="right")
    out.add_column("why not measured", overflow="fold")
    for first in (row for row in rows if row.case is cases[0]):
        line = {row.case: row for row in rows if (row.provider, row.pass_) == (first.provider, first.pass_)}
        if any(row.samples for row in line.values()):
            reasons = [f"{row.case.name}: {_reason(row)}" for row in line.values() if row.reason]
            style = "bold" if first.provider.ours else None
            times = [_ms(line[case].ms) for case in cases]
            name = [first.provider.name, short_pass(first.pass_)]
            out.add_row(*name, *times, _growth(list(line.values())), "\n".join(reasons), style=style)
        elif first.pass_ == first.provider.passes[0]:
            out.add_row(first.provider.name, *["–"] * (len(cases) + 2), _reason(first))
    return out


def _growth(rows: Sequence[Row]) -> str:
    measured = [(math.log(row.suite.size(row.case)), math.log(row.ms)) for row in rows if row.ms]
    if len(measured) < 2:
        return "–"
    return f"{statistics.linear_regression(*zip(*measured, strict=True)).slope:.2f}"


def _reason(row: Row) -> str:
    return f"[{'red' if row.failed else 'dim'}]{escape(row.reason or '')}[/]"


def _figures(row: Row, with_host: bool, with_tokens: bool, with_floor: bool) -> list[str]:
    assert row.ms is not None
    seconds = row.ms / 1e3
    value = f"[dim]{row.provider.unchecked}[/]" if row.value is None else f"{row.value:.12f}"
    tokens = [f"{row.case.tokens / seconds:,.0f}"] if with_tokens and row.case.tokens else []
    return [
        row.provider.name,
        short_pass(row.pass_),
        f"{_ms(row.ms)} ({_ms(row.percentile(0.2))}–{_ms(row.percentile(0.8))})",
        *(["–" if row.host_us is None else f"{row.host_us:,.0f}"] if with_host else []),
        *tokens,
        f"{row.bytes / seconds / 1e9:.1f}",
        f"{row.flops / seconds / 1e12:.3f}",
        "–" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f}",
        format_bytes(row.peak_bytes),
        "–" if row.provider.graph_free else format_bytes(row.saved_bytes),
        _times(row.speedup_vs_eager),
        _times(row.speedup_vs_rival),
        *([_times(row.times_floor)] if with_floor else []),
        f"[bold red]WRONG {value} (off by {row.error:.1e})[/]" if row.wrong else value,
    ]


def print_notes(console: Console, rows: Sequence[Row]) -> None:
    """What the figures mean, and every value that is wrong."""
    versions = rows[0].versions
    named = ", ".join(f"{key} {value}" for key, value in versions.items() if value is not None)
    console.print(
        f"[dim]{escape(named)}; THP_MEM_ALLOC_ENABLE {'set' if versions['THP_MEM_ALLOC_ENABLE'] else 'not set'}[/]"
    )
    console.print(
        "[dim]GB/s, TFLOP/s and % roof count the bytes and operations that the pass needs, whoever does it; the roof is"
        " a copy and a GEMM measured in this run (small cases lie in a cache and may pass it; so may, on a CPU, passes"
        " that mostly read, since a store there first reads what it overwrites). peak: beyond the"
        " inputs, fresh gradients included. saved: kept by autograd between the passes."
        + (
            " Speedups on the CPU are medians of the ratios within interleaved rounds, so they need not equal the"
            " ratio of the medians shown. Our C++ kernels for CosReg and ADMIN ask for 2 MiB pages for what they write"
            " (madvise); THP_MEM_ALLOC_ENABLE=1 gives them to every provider."
            if rows[0].device == "cpu"
            else " ms: one CUDA graph of the step on several sets of inputs, which together are a few times as large as"
            " the L2 cache; where a step cannot be captured, events around it. host µs: until a call on an idle GPU"
            " returns."
        )
        + "[/]"
    )
    for row in rows:
        if row.wrong:
            console.print(
                f"[bold red]WRONG VALUE[/]: {row.suite.op}, {escape(row.case.name)}, {row.provider.name}, {row.pass_}: "
                f"{row.value!r}, the float64 value is {row.exact!r} (relative error {row.error:.1e})"
            )


def format_bytes(size: int | None) -> str:
    if size is None:
        return "–"
    if abs(size) < 1e3:
        return f"{size} B"
    mark, unit = next((m, u) for m, u in reversed(_MARKS.items()) if abs(size) >= u)
    return f"{size / unit:.3g} {mark}" if abs(size) < 1000 * unit else f"{size / unit:,.0f} {mark}"


def short_pass(pass_: str) -> str:
    return pass_.replace("forward", "fwd").replace("backward", "bwd")


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f}×"
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.1g}×"
