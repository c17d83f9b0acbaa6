"""Charts as inline SVG. Colours of text and lines come from the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from repdeg_fast.analysis.report.charts import PALETTE, Bars, Chart, Heatmap, Lines, Scatter, short, viridis

WIDTH, HEIGHT = 420, 300  # small on purpose: on a phone the letters are still letters
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 12, 10, 44


def svg(chart: Chart) -> str:
    if isinstance(chart, Lines):
        body, height = _lines(chart)
    elif isinstance(chart, Bars):
        body, height = _bars(chart), HEIGHT
    elif isinstance(chart, Heatmap):
        body, height = _heatmap(chart)
    else:
        body, height = _scatter(chart)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(chart.title, quote=True)}"'
        f' xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


class _Frame:
    """From data to places in the picture, with axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], bottom: float = HEIGHT - _BOTTOM):
        self.x, self.y, self.bottom = x, y, bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), self.bottom - up * (self.bottom - _TOP)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        out = []
        for value in _nice(*self.y):
            _, y = self.at(self.x[0], value)
            out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(_text(_LEFT - 5, y + 4, short(value), "end"))
        middle = (_TOP + self.bottom) / 2
        out.append(_text((_LEFT + WIDTH - _RIGHT) / 2, self.bottom + 36, x_label))
        out.append(_text(12, middle, y_label, extra=f' transform="rotate(-90 12 {middle:.1f})"'))
        return out


def _nice(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5.5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float], zero: bool = True) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if zero and 0 < low < 0.6 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if low == 0 else low - margin), high + margin


def _lines(chart: Lines) -> tuple[list[str], float]:
    frame = _Frame((0, max(len(chart.ticks) - 1, 1)), _range([v for curve in chart.curves.values() for v in curve]))
    out = frame.axes(chart.x_label, chart.y_label)
    every = math.ceil(len(chart.ticks) / 13)
    for i, tick in enumerate(chart.ticks):
        if i % every == 0:
            out.append(_text(frame.at(i, frame.y[0])[0], frame.bottom + 17, tick))
    for (name, curve), colour in zip(chart.curves.items(), PALETTE, strict=False):
        places = [frame.at(i, value) for i, value in enumerate(curve) if math.isfinite(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        marks = [(i, value) for i, value in enumerate(curve) if math.isfinite(value)]
        for (x, y), (i, value) in zip(places, marks, strict=True):
            tip = escape(f"{name}, {chart.ticks[i]}: {value:.4g}")
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}"><title>{tip}</title></circle>')
    legend, height = _legend(list(chart.curves), HEIGHT) if len(chart.curves) > 1 else ([], HEIGHT)
    return out + legend, height


def _legend(names: Sequence[str], top: float) -> tuple[list[str], float]:
    """Names under a picture, as many in a line as fit."""
    out, x, y = [], float(_LEFT), top + 12
    for name, colour in zip(names, PALETTE, strict=False):
        width = 24 + 7.2 * len(name)
        if x + width > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 18
        out.append(f'<circle cx="{x + 5:.1f}" cy="{y - 4:.1f}" r="5" fill="{colour}"/>')
        out.append(_text(x + 14, y, name, "start"))
        x += width
    return out, y + 10


def _bars(chart: Bars) -> list[str]:
    frame = _Frame((chart.edges[0], chart.edges[-1]), (0, 1.05 * max(chart.heights) or 1))
    out = frame.axes(chart.x_label, chart.y_label)
    for value in _nice(*frame.x):
        out.append(_text(frame.at(value, 0)[0], frame.bottom + 17, short(value)))
    for i, height in enumerate(chart.heights):
        (x, y), (right, bottom) = frame.at(chart.edges[i], height), frame.at(chart.edges[i + 1], 0)
        tip = escape(f"{chart.edges[i]:.3g} to {chart.edges[i + 1]:.3g}: {height:.4g}")
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(right - x - 0.5, 0.5):.1f}" height="{bottom - y:.1f}"'
        out.append(f'<rect {box} fill="{PALETTE[0]}"><title>{tip}</title></rect>')
    return out


def _heatmap(chart: Heatmap) -> tuple[list[str], float]:
    left, bottom_space = 62, 46
    side = (WIDTH - left - _RIGHT) / len(chart.columns)
    height = min(side, 46) * len(chart.rows)
    row = height / len(chart.rows)
    out = []
    for i, values in enumerate(chart.values):
        out.append(_text(left - 5, _TOP + (i + 0.5) * row + 4, chart.rows[i], "end"))
        for j, value in enumerate(values):
            x, y = left + j * side, _TOP + i * row
            tip = escape(f"{chart.rows[i]} and {chart.columns[j]}: {value:.4f}")
            box = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{row:.1f}"'
            out.append(f'<rect {box} fill="{viridis(value)}"><title>{tip}</title></rect>')
            if side >= 36:
                colour = "#000" if value > 0.55 else "#fff"
                out.append(_text(x + side / 2, y + row / 2 + 4, f"{value:.2f}", extra=f' style="fill:{colour}"'))
    every = math.ceil(len(chart.columns) / 13)
    for j, name in enumerate(chart.columns):
        if j % every == 0:
            out.append(_text(left + (j + 0.5) * side, _TOP + height + 16, name))
    middle = _TOP + height / 2
    out.append(_text(left + (WIDTH - left - _RIGHT) / 2, _TOP + height + 36, chart.x_label))
    out.append(_text(12, middle, chart.y_label, extra=f' transform="rotate(-90 12 {middle:.1f})"'))
    return out, _TOP + height + bottom_space


def _scatter(chart: Scatter) -> tuple[list[str], float]:
    origin = [0.0] if chart.origin else []
    across, up = (_range([*values, *origin], zero=False) for values in (chart.x, chart.y))
    frame = _Frame(across, up, HEIGHT - 8)
    out = []
    for i in range(len(chart.x)):
        x, y = frame.at(chart.x[i], chart.y[i])
        out.append(f'<circle cx="{x - 20:.1f}" cy="{y:.1f}" r="2.4" fill="{_colour(chart, i)}" fill-opacity=".75"/>')
    if chart.origin:
        x, y = frame.at(0, 0)
        out.append(f'<path d="M{x - 29:.1f} {y:.1f}h18m-9 -9v18" class="origin"><title>origin</title></path>')
    if chart.values is None:
        legend, height = _legend(chart.names, HEIGHT + 14) if chart.names else ([], HEIGHT)
        return out + legend, height
    low, high = min(chart.values), max(chart.values)
    for i in range(40):
        out.append(f'<rect x="{_LEFT + 4 * i}" y="{HEIGHT + 4}" width="4.2" height="10" fill="{viridis(i / 39)}"/>')
    words = f"{chart.value_label}: {short(low)} to {short(high)}"
    return [*out, _text(_LEFT, HEIGHT + 31, words, "start")], HEIGHT + 40


def _colour(chart: Scatter, i: int) -> str:
    if chart.values is not None:
        low, high = min(chart.values), max(chart.values)
        return viridis((chart.values[i] - low) / ((high - low) or 1))
    return PALETTE[(chart.groups[i] if chart.groups is not None else 0) % len(PALETTE)]
