"""PNG plots of a run. matplotlib comes with the extra ``cli``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from repdeg_fast.analysis.pictures import plain, pyplot
from repdeg_fast.bench.memory import Timeline
from repdeg_fast.bench.report import format_bytes
from repdeg_fast.bench.runner import Row
from repdeg_fast.bench.suite import PASSES, Case

_OURS = "#1f6fb4"
_OTHERS = "#9a9a9a"
_PHASES = {"forward": "#f2c14e", "backward": "#7fb77e", "both passes": "#c08fd0"}


def plot_run(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time and memory of each case as bars, and each sweep as lines; returns the files written."""
    measured = [row for row in rows if row.samples]
    if not measured:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    op = measured[0].suite.op
    written = []
    single = [row for row in measured if row.case.group is None]
    if single:
        written += [_plot_time(single, folder / f"{op}-time.png"), _plot_memory(single, folder / f"{op}-memory.png")]
    for group in _unique(row.case.group for row in measured if row.case.group):
        points = [row for row in measured if row.case.group == group]
        written.append(_plot_sweep(points, folder / f"{op}-{group}.png"))
    return written


def _plot_time(rows: Sequence[Row], path: Path) -> Path:
    cases = _unique(row.case for row in rows)
    grid = _Grid(rows, cases, PASSES)
    for axis, case, pass_ in grid.panels():
        bars = [row for row in rows if row.case is case and row.pass_ == pass_]
        values = [row.ms or 0 for row in bars]
        notes = [
            f" {_short(value)} ms" + (f"  ({row.speedup_vs_eager:.3g}×)" if row.speedup_vs_eager else "")
            for row, value in zip(bars, values, strict=True)
        ]
        low = [value - (row.percentile(0.2) or 0) for row, value in zip(bars, values, strict=True)]
        high = [(row.percentile(0.8) or 0) - value for row, value in zip(bars, values, strict=True)]
        _bars(axis, bars, values, notes, errors=[low, high])
        axis.set_xlabel("ms, median (whisker: p20–p80); in brackets: times faster than eager")
        axis.set_title(f"{plain(str(case))}\n{pass_}")
    return grid.save(path, f"{rows[0].suite.op}: time on {_where(rows[0])}")


def _plot_memory(rows: Sequence[Row], path: Path) -> Path:
    rows = [row for row in rows if row.pass_ == PASSES[-1] and row.peak_bytes is not None]
    cases = _unique(row.case for row in rows)
    kinds = ("peak", "saved")
    grid = _Grid(rows, cases, kinds)
    for axis, case, kind in grid.panels():
        bars = [row for row in rows if row.case is case]
        sizes = [(row.peak_bytes if kind == "peak" else row.saved_bytes) or 0 for row in bars]
        _bars(axis, bars, [size / 1e6 for size in sizes], [f" {format_bytes(size)}" for size in sizes])
        explained = "peak beyond the inputs (fresh gradients included)" if kind == "peak" else "saved for backward"
        axis.set_xlabel(f"MB, {explained}")
        axis.set_title(f"{plain(str(case))}\n{explained}")
    return grid.save(path, f"{rows[0].suite.op}: memory of forward+backward on {_where(rows[0])}")


class _Grid:
    """A figure with one row of panels a case, one column a kind, each tall enough for its bars."""

    def __init__(self, rows: Sequence[Row], cases: Sequence[Case], kinds: Sequence[str]) -> None:
        self._plt = pyplot()
        self._cases, self._kinds = cases, kinds
        bars = len({row.provider.name for row in rows})
        height = (0.36 * bars + 1.3) * len(cases) + 0.5
        self._figure, self._axes = self._plt.subplots(
            len(cases), len(kinds), figsize=(7 * len(kinds), height), squeeze=False, layout="constrained"
        )

    def panels(self) -> Iterable[tuple[Any, Case, str]]:
        for row, case in zip(self._axes, self._cases, strict=True):
            for axis, kind in zip(row, self._kinds, strict=True):
                yield axis, case, kind

    def save(self, path: Path, title: str) -> Path:
        self._figure.suptitle(title, fontweight="bold")
        self._figure.savefig(path, dpi=120)
        self._plt.close(self._figure)
        return path


def _bars(axis: Any, rows: Sequence[Row], values: Sequence[float], notes: Sequence[str], errors: Any = None) -> None:
    names = [row.provider.name for row in rows]
    colours = [_OURS if row.provider.ours else _OTHERS for row in rows]
    axis.barh(names, values, color=colours, xerr=errors, error_kw={"elinewidth": 1, "ecolor": "#444444"})
    axis.invert_yaxis()
    right = [value + (errors[1][i] if errors else 0) for i, value in enumerate(values)]
    for i, note in enumerate(notes):
        axis.text(right[i], i, note, va="center")
    axis.set_xlim(0, 1.4 * max([*right, 1e-9]))


def _plot_sweep(rows: Sequence[Row], path: Path) -> Path:
    """Both axes logarithmic: where the cost is linear, the lines run parallel to the dashed one."""
    plt = pyplot()
    suite = rows[0].suite
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes) + 2, 5), squeeze=False, layout="constrained")
    names = _unique(row.provider.name for row in rows)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, pass_ in zip(axes[0], passes, strict=True):
        of_pass = [row for row in rows if row.pass_ == pass_]
        for name in _unique(row.provider.name for row in of_pass):
            points = sorted((suite.size(row.case), row.ms) for row in of_pass if row.provider.name == name)
            style = "o-" if name.startswith("ours") else "s--"
            axis.plot(*zip(*points, strict=True), style, color=colours[name], label=name, linewidth=1.6, markersize=5)
        sizes = sorted({suite.size(row.case) for row in of_pass})
        lowest = min(row.ms or 1 for row in of_pass if suite.size(row.case) == sizes[0])
        guide = [0.5 * lowest * size / sizes[0] for size in sizes]
        axis.plot(sizes, guide, ":", color="black", label=f"in proportion to {suite.size_label}")
        axis.set(xscale="log", yscale="log", xlabel=suite.size_label, ylabel="ms, median", title=pass_)
        axis.grid(alpha=0.25, which="both")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.suptitle(f"{suite.op}: how the cost grows with {suite.size_label}, on {_where(rows[0])}", fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def plot_timelines(timelines: dict[str, Timeline], title: str, path: Path) -> Path:
    """Allocated bytes over time, one panel a provider, all on one vertical scale."""
    plt = pyplot()
    figure, axes = plt.subplots(
        len(timelines), 1, figsize=(9, 1.9 * len(timelines) + 0.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (name, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        ms = [0.0, *(point[0] for point in timeline.points)]
        sizes = [0.0, *(point[1] / 1e6 for point in timeline.points)]
        axis.fill_between(ms, sizes, step="post", color=_OURS if name.startswith("ours") else _OTHERS, alpha=0.8)
        for phase, span in timeline.phases.items():
            axis.axvspan(*span, color=_PHASES[phase], alpha=0.25, linewidth=0, zorder=0)
        axis.set_title(f"{name}: peak {format_bytes(timeline.peak())}", loc="left")
        axis.set_ylabel("MB")
        axis.margins(x=0.01)
    axes[0, 0].set_ylim(0, 1.05e-6 * max(1, *(timeline.peak() for timeline in timelines.values())))
    seen = _unique(phase for timeline in timelines.values() for phase in timeline.phases)
    patches = [plt.Rectangle((0, 0), 1, 1, color=_PHASES[phase], alpha=0.25) for phase in seen]
    figure.legend(patches, seen, loc="outside lower center", ncols=len(seen), frameon=False)
    axes[-1, 0].set_xlabel("ms (under the profiler, slower than alone)")
    figure.suptitle(plain(title), fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _where(row: Row) -> str:
    return f"{row.versions['device_name']}, torch {row.versions['torch']}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
