"""Pictures as data: drawn as SVG in a page and by matplotlib as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PALETTE = ("#3b7dd8", "#d9642c", "#2f9e6e", "#b0529f", "#b8901b", "#6c6fd1", "#c9485b", "#4aa3b5")  # on white and black
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Lines:
    """Curves over shared ticks, by layer, say; NaN leaves a gap."""

    title: str
    ticks: Sequence[str]
    curves: Mapping[str, Sequence[float]]
    y_label: str = ""
    x_label: str = "layer"


@dataclass(frozen=True)
class Bars:
    """A histogram: bar i goes from edge i to i + 1."""

    title: str
    edges: Sequence[float]
    heights: Sequence[float]
    x_label: str
    y_label: str = "share"


@dataclass(frozen=True)
class Heatmap:
    """values[row][column] in [0, 1]."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True)
class Scatter:
    """Points in the plane, coloured by group or by value."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    groups: Sequence[int] | None = None  # index into names
    names: Sequence[str] = field(default=())
    values: Sequence[float] | None = None
    value_label: str = ""
    origin: bool = False  # is marked


Chart = Lines | Bars | Heatmap | Scatter


def viridis(share: float) -> str:
    """A colour for a number in [0, 1]; grey for NaN."""
    if math.isnan(share):
        return "#888888"
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)]
    return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"


def short(value: float) -> str:
    return f"{value:.3g}"
