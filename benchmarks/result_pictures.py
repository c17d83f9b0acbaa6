"""Time and memory of one case as bars, an SVG that a page of the documentation shows above its table of results."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _LEFT, _LINE, _TOP = 760, 176, 26, 56
_PANELS = ((_LEFT, 300), (_LEFT + 330, 160))  # where the bars of time and of memory start, and how long they may be
_OURS, _OTHERS = "#1f6fb4", "#b3b8c2"
_PAPER = "#ffffff"  # of its own, so that it reads the same on a light and on a dark page


def bars(rows: Sequence[dict], title: str) -> str:
    """``rows``: the measured providers of one case and pass, as ``repdeg-fast bench --json`` writes them."""
    rows = sorted(rows, key=lambda row: row["ms_median"])
    height = _TOP + _LINE * len(rows) + 14
    drawn = [
        f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="{_PAPER}"/>',
        _text(14, 22, title, weight="bold"),
        *(_text(x, _TOP - 10, words) for (x, _), words in zip(_PANELS, ("ms", "MB at the peak"), strict=True)),
    ]
    for panel, key, scale in ((_PANELS[0], "ms_median", 1.0), (_PANELS[1], "peak_bytes", 1e-6)):
        drawn += _panel(rows, panel, [row[key] and row[key] * scale for row in rows])
    for line, row in enumerate(rows):
        ours = row["provider"].startswith("ours")
        drawn.append(_text(_LEFT - 8, _middle(line), row["provider"], "end", "bold" if ours else "normal"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        f' role="img" font-family="sans-serif" font-size="13" fill="#24292f"><title>{escape(title)}</title>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _panel(rows: Sequence[dict], panel: tuple[int, int], values: Sequence[float | None]) -> list[str]:
    start, longest = panel
    largest = max((value for value in values if value is not None), default=0.0) or 1.0
    drawn = []
    for line, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        length, colour = longest * 0.75 * value / largest, _OURS if row["provider"].startswith("ours") else _OTHERS
        drawn.append(
            f'<rect x="{start}" y="{_TOP + _LINE * line}" width="{length:.1f}" height="{_LINE - 7}" fill="{colour}"/>'
        )
        drawn.append(_text(start + length + 5, _middle(line), f"{value:,.0f}" if value >= 100 else f"{value:.3g}"))
    return drawn


def _middle(line: int) -> float:
    return _TOP + _LINE * line + 14


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
