"""The same charts as PNG files, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from repdeg_fast.analysis.pictures import dot_size, plain, pyplot
from repdeg_fast.analysis.report.charts import PALETTE, Bars, Chart, Heatmap, Lines, Scatter


def save_png(chart: Chart, path: Path) -> Path:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 5), layout="tight")
    if isinstance(chart, Lines):
        for (name, curve), colour in zip(chart.curves.items(), PALETTE, strict=False):
            axes.plot(range(len(curve)), curve, marker="o", color=colour, label=plain(name))
        axes.set_xticks(range(len(chart.ticks)), chart.ticks)
        axes.set(xlabel=plain(chart.x_label), ylabel=plain(chart.y_label))
        axes.grid(alpha=0.25)
        if len(chart.curves) > 1:
            axes.legend(frameon=False)
    elif isinstance(chart, Bars):
        axes.stairs(chart.heights, chart.edges, fill=True, color=PALETTE[0])
        axes.set(xlabel=plain(chart.x_label), ylabel=plain(chart.y_label))
    elif isinstance(chart, Heatmap):
        image = axes.imshow(chart.values, vmin=0, vmax=1)
        axes.set_xticks(range(len(chart.columns)), chart.columns)
        axes.set_yticks(range(len(chart.rows)), chart.rows)
        axes.set(xlabel=plain(chart.x_label), ylabel=plain(chart.y_label))
        figure.colorbar(image, ax=axes)
    elif chart.values is not None:
        dots = axes.scatter(chart.x, chart.y, c=chart.values, s=dot_size(len(chart.x)))
        figure.colorbar(dots, ax=axes, label=plain(chart.value_label))
    else:
        groups = chart.groups or [0] * len(chart.x)
        for group, name in enumerate(chart.names or [""]):
            chosen = [i for i, own in enumerate(groups) if own == group]
            colour = PALETTE[group % len(PALETTE)]
            axes.scatter(
                [chart.x[i] for i in chosen], [chart.y[i] for i in chosen], s=dot_size(len(groups)), color=colour,
                label=plain(name),
            )  # fmt: skip
        if chart.names:
            axes.legend(frameon=False, markerscale=3)
    if isinstance(chart, Scatter) and chart.origin:
        axes.plot(0, 0, "+", color="red", markersize=14, markeredgewidth=2)
    axes.set_title(plain(chart.title))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
