"""The rows of a run as tables for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repdeg_fast.bench.gpu_timing import GRAPH
from repdeg_fast.bench.measure import speedup
from repdeg_fast.bench.runner import Row
from repdeg_fast.bench.suite import PASSES, dtype_name

_MARKS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def plain_table(title: str, caption: str = "") -> Table:
    """Few lines between few columns, so that it fits a terminal of 80; ``caption`` may hold markup."""
    return Table(
        title=escape(title), title_justify="left", caption=caption or None, caption_justify="left", box=SIMPLE_HEAD,
        pad_edge=False, show_edge=False,
    )  # fmt: skip


def write_json(rows: Sequence[Row], path: Path) -> None:
    write_rows([row.as_json() for row in rows], path)


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Replaced as a whole: whoever reads it while a run goes on, or after one was killed, finds it complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(draft, path)


def table(rows: Sequence[Row], wide: bool = False) -> Table:
    """The rows of one case; below it our speedups, and who was not measured and why. ``wide``: with every figure."""
    first = rows[0]
    title = f"{first.suite.op} · {first.case} on {first.device}"
    exact = [] if first.exact is None else [f"{first.suite.value_name} in float64 = {first.exact:.12f}"]
    facts = [*exact, *_verdicts(rows), *_timed_otherwise(rows)]
    caption = "\n".join([escape("\n".join(facts)), *_left_out(rows)])
    out = plain_table(title, caption)
    columns = _columns(rows, wide)
    for name in columns:
        text = name in ("provider", "pass", "value", first.suite.value_name)
        out.add_column(name, no_wrap=not name.startswith(("vs", "time")), justify="left" if text else "right")
    for row in rows:
        if row.samples:
            out.add_row(*(figure(row) for figure in columns.values()), style="bold" if row.provider.ours else None)
    return out


def _columns(rows: Sequence[Row], wide: bool) -> dict[str, Callable[[Row], str]]:
    """The name of each column, and what stands in it."""
    case, value_name = rows[0].case, rows[0].suite.value_name
    floor = next((row.provider.name for row in rows if row.times_floor), None)
    columns: dict[str, Callable[[Row], str]] = {
        "provider": lambda row: row.provider.name,
        "pass": lambda row: short_pass(row.pass_),
        "ms": lambda row: _ms(row.ms),
        "vs eager": lambda row: _times(row.speedup_vs_eager),
        "vs best rival": lambda row: _times(row.speedup_vs_rival),
        "peak": lambda row: format_bytes(row.peak_bytes),
    }
    if not wide:
        return columns | {"value": _verdict}
    if any(row.host_us is not None for row in rows):
        columns["host µs"] = lambda row: "–" if row.host_us is None else f"{row.host_us:,.0f}"
    columns["p20–p80"] = lambda row: f"{_ms(row.percentile(0.2))}–{_ms(row.percentile(0.8))}"
    if case.tokens is not None:
        columns["tokens/s"] = lambda row: f"{1e3 * (row.case.tokens or 0) / (row.ms or 1):,.0f}"
    columns["GB/s"] = lambda row: f"{row.bytes / (row.ms or 1) / 1e6:.1f}"
    columns["TFLOP/s"] = lambda row: f"{row.flops / (row.ms or 1) / 1e9:.3f}"
    columns["% roof"] = lambda row: "–" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f}"
    columns["saved"] = lambda row: "–" if row.provider.graph_free else format_bytes(row.saved_bytes)
    if floor:
        columns[f"time ÷ {floor}"] = lambda row: _times(row.times_floor)
    return columns | {value_name: _value}


def _verdict(row: Row) -> str:
    if row.provider.floor:
        return "[dim]a floor[/]"
    return "[bold red]WRONG[/]" if row.wrong else "[dim]not compared[/]" if row.value is None else "ok"


def _value(row: Row) -> str:
    value = f"[dim]{row.provider.unchecked}[/]" if row.value is None else f"{row.value:.12f}"
    return f"[bold red]WRONG {value} (off by {row.error:.1e})[/]" if row.wrong else value


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
    first_rows = [row for row in rows if row.case is cases[0]]
    lines = [[row for row in rows if (row.provider, row.pass_) == (f.provider, f.pass_)] for f in first_rows]
    reasons = [f"not measured: {line[0].provider.name}: {reason}" for line in lines for reason in _reasons(line)]
    out = plain_table(title, "\n".join([escape(caption), *dict.fromkeys(reasons)]))
    out.add_column("provider", no_wrap=True)
    out.add_column("pass", no_wrap=True)
    for case in cases:
        out.add_column(f"{suite.size(case):,}", justify="right", no_wrap=True)
    out.add_column("growth", justify="right")
    for line in lines:
        if any(row.samples for row in line):
            times = {row.case: _ms(row.ms) for row in line}
            name = [line[0].provider.name, short_pass(line[0].pass_)]
            style = "bold" if line[0].provider.ours else None
            out.add_row(*name, *(times[case] for case in cases), _growth(line), style=style)
    return out


def _reasons(line: Sequence[Row]) -> list[str]:
    """Why a provider was not measured: once where it was for no size, else with the size."""
    if not any(row.samples for row in line):
        return [_reason(line[0])]
    return [f"{escape(row.case.name)}: {_reason(row)}" for row in line if row.reason]


def summary(rows: Sequence[Row]) -> Table:
    """An operation a row: our fastest against the best of the others, in the least favourable of its cases."""
    caption = (
        "times as fast as the fastest other, which is named; peak: how many times less memory, forward+backward, than"
        " the one that needs least. Of several cases the least favourable. value: against float64"
    )
    out = plain_table("How we stand against the best rival", caption)
    for name in ("operation", *map(short_pass, PASSES), "peak", "value"):
        out.add_column(name, no_wrap=name == "operation", overflow="fold")
    for op in dict.fromkeys(row.suite.op for row in rows):
        mine = [row for row in rows if row.suite.op == op]
        cases = list(dict.fromkeys(row.case for row in mine))
        of_pass = [[[row for row in mine if (row.case, row.pass_) == (c, pass_)] for c in cases] for pass_ in PASSES]
        times = [min(filter(None, map(_against_rival, of_cases)), default=None) for of_cases in of_pass]
        less = min((x for x in map(_less_memory, of_pass[-1]) if x is not None), default=None)
        name = op if len(cases) == 1 else f"{op} ({len(cases)} cases)"
        cells = ["–" if found is None else f"{_times(found[0])} {found[1]}" for found in times]
        out.add_row(name, *cells, _times(less), _of_values([row for row in mine if row.provider.ours]))
    return out


def _against_rival(rows: Sequence[Row]) -> tuple[float, str] | None:
    """Of one case and pass: the ratio, and the rival's name."""
    ours, rivals = _ours_and_rivals(rows)
    if not ours or not rivals:
        return None
    best, rival = (min(side, key=lambda row: row.ms or 0) for side in (ours, rivals))
    return speedup(rival.samples, best.samples, torch.device(best.device)), rival.provider.name


def _less_memory(rows: Sequence[Row]) -> float | None:
    """The peak of the rival with the least, as a multiple of that of our fastest."""
    ours, rivals = _ours_and_rivals(rows)
    peaks = [row.peak_bytes for row in rivals if row.peak_bytes is not None]
    mine = min(ours, key=lambda row: row.ms or 0).peak_bytes if ours else None
    return min(peaks) / mine if peaks and mine else None


def _ours_and_rivals(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    measured = [row for row in rows if row.samples]
    return [row for row in measured if row.provider.ours], [row for row in measured if row.provider.rival]


def _of_values(ours: Sequence[Row]) -> str:
    checked = [row for row in ours if row.error is not None]
    if any(row.wrong for row in checked) or any(row.failed for row in ours):
        return "[bold red]WRONG[/]" if any(row.wrong for row in checked) else "[bold red]failed[/]"
    return "ok" if checked else "[dim]not compared[/]"


def _growth(rows: Sequence[Row]) -> str:
    measured = [(math.log(row.suite.size(row.case)), math.log(row.ms)) for row in rows if row.ms]
    if len(measured) < 2:
        return "–"
    return f"{statistics.linear_regression(*zip(*measured, strict=True)).slope:.2f}"


def _reason(row: Row) -> str:
    return f"[{'red' if row.failed else 'dim'}]{escape(row.reason or '')}[/]"


_OF_WIDE = (
    " GB/s, TFLOP/s and % roof count the bytes and operations that the pass needs, whoever does it; the roof is a copy"
    " and a GEMM measured in this run (small cases lie in a cache and may pass it; so may, on a CPU, passes that mostly"
    " read, since a store there first reads what it overwrites). saved: kept by autograd between the passes."
)
_OF_GPU = (
    " ms: one CUDA graph of the step on several sets of inputs, which together are a few times as large as the L2"
    " cache; where a step cannot be captured, events around it. host µs: until a call on an idle GPU returns."
)
_OF_CPU = (
    " Speedups on the CPU are medians of the ratios within interleaved rounds, so they need not equal the ratio of the"
    " medians shown. Our C++ kernels for CosReg and ADMIN ask for 2 MiB pages for what they write (madvise);"
    " THP_MEM_ALLOC_ENABLE=1 gives them to every provider."
)


def print_notes(console: Console, rows: Sequence[Row], wide: bool = False) -> None:
    """What the figures mean, and every value that is wrong."""
    versions = rows[0].versions
    named = ", ".join(f"{key} {value}" for key, value in versions.items() if value is not None)
    console.print(
        f"[dim]{escape(named)}; THP_MEM_ALLOC_ENABLE {'set' if versions['THP_MEM_ALLOC_ENABLE'] else 'not set'}[/]"
    )
    of_device = _OF_CPU if rows[0].device == "cpu" else _OF_GPU
    more = _OF_WIDE if wide else " More columns: --wide; every figure: --json."
    console.print(f"[dim]ms: median. peak: beyond the inputs, fresh gradients included.{more}{of_device}[/]")
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
