"""Cosines between points: their mean, their histogram, uniformity and alignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import CHUNK, check_points
from repdeg_fast.analysis.tiles import pair_tiles, sampled, unit_rows
from repdeg_fast.functional import pairwise_cosine


def direction_sum(points: Tensor) -> tuple[Tensor, int]:
    """Σ x/‖x‖ (d,) in float64, and how many points are not zero."""
    check_points("points", points)
    total, nonzero = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device), 0
    for rows in points.split(CHUNK):
        unit = unit_rows(rows.double())
        total += unit.sum(0)
        nonzero += int(unit.any(1).sum())
    return total, nonzero


def average_cosine(points: Tensor) -> float:
    """Mean cosine over pairs of different non-zero points, in O(Nd): (‖Σ x̂‖² − n)/(n(n − 1)). 0 for points in all
    directions, 1 for points in one; NaN where fewer than two points are not zero."""
    return mean_cosine(*direction_sum(points))


def mean_cosine(total: Tensor, n: int) -> float:
    """:func:`average_cosine` of n points whose directions add up to ``total``."""
    return (float(total.square().sum()) - n) / (n * (n - 1)) if n > 1 else math.nan


def cosine_histogram(points: Tensor, bins: int = 100, sample: int | None = None) -> tuple[Tensor, Tensor]:
    """Counts (bins,) of the cosines of all pairs i < j, and the edges (bins + 1,) from −1 to 1.

    With ``sample`` points are that many at most, drawn without replacement, always the same ones.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    points = sampled(points, sample)
    counts = torch.zeros(bins, dtype=torch.float64)
    for cosines in pair_tiles(points):
        counts += cosines.float().clamp(-1, 1).histc(bins, -1, 1).double().cpu()
    return counts.long(), torch.linspace(-1, 1, bins + 1, dtype=torch.float64)


def uniformity(points: Tensor, t: float = 2.0, sample: int | None = None) -> float:
    """log mean exp(−t‖x̂ − ŷ‖²) over pairs of different points (Wang and Isola, 2005.10242): 0 where all point one
    way, lower the more evenly they are spread; near −2t in high dimension. Zero points add nothing to the sum, but
    count among the pairs. ``sample`` as in :func:`cosine_histogram`."""
    if not t > 0:
        raise ValueError(f"t: expected a number above 0, got {t}")
    points = sampled(points, sample)
    if len(points) < 2:
        raise ValueError(f"points: expected at least 2, got {len(points)}")
    with torch.no_grad():
        return float(pairwise_cosine(unit_rows(points), kind="logmeanexp", temperature=1 / (2 * t))) - 2 * t


def uniformity_of_even(d: int, t: float = 2.0) -> float:
    """:func:`uniformity` of directions that are spread evenly: log E exp(2t(c − 1)), c the cosine of two of them, whose
    moments E c^2k = (1/2)_k / (d/2)_k make a series."""
    term = total = 1.0
    for k in range(1, 1000):
        term *= t * t / (k * (d / 2 + k - 1))  # (2t)^2k / (2k)! · E c^2k
        total += term
        if term < 1e-17 * total:
            break
    return math.log(total) - 2 * t


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> float:
    """Mean ‖x̂ − ŷ‖^α over rows that belong together, two encodings of one text, say (Wang and Isola): 0 is best.

    Raises:
        ValueError: shapes that differ, no rows, or NaN.
    """
    for name, points in (("x", x), ("y", y)):
        check_points(name, points)
    if x.shape != y.shape or len(x) == 0:
        raise ValueError(f"y: expected the shape of x and rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    total = 0.0
    for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        total += float((unit_rows(a.double()) - unit_rows(b.double())).norm(dim=1).pow(alpha).sum())
    return total / len(x)
