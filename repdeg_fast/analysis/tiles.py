"""Cosines of all pairs of points, a tile at a time: the one place that knows how they are made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import check_points

ROWS = 512  # of a tile; with 16,384 columns 32 MiB in float32
COLUMNS = 16384


def cosine_tiles(x: Tensor, y: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (i, j, tile): tile[a, b] is the cosine of x[i + a] and y[j + b]. All columns of a row come in turn.

    Beyond the inputs one tile and one panel of unit rows are in memory. A zero row has cosine 0 with everything.
    """
    for i in range(0, len(x), ROWS):
        rows = unit_rows(x[i : i + ROWS])
        for j in range(0, len(y), COLUMNS):
            yield i, j, rows @ unit_rows(y[j : j + COLUMNS]).T


def pair_tiles(points: Tensor) -> Iterator[Tensor]:
    """The cosines of every unordered pair i < j of different points, once each, as vectors of at most 4 M."""
    side = 2048
    for i in range(0, len(points), side):
        rows = unit_rows(points[i : i + side])
        own = rows @ rows.T
        yield own[torch.ones_like(own, dtype=torch.bool).triu(1)]
        for j in range(i + side, len(points), side):
            yield (rows @ unit_rows(points[j : j + side]).T).flatten()


def unit_rows(points: Tensor) -> Tensor:
    """Of length 1, or 0 for a zero row, in float32 at least."""
    points = points.detach()
    points = points if points.dtype == torch.float64 else points.float()
    # in float64: squares of 1e30 or 1e-30 leave fp32's range
    norms = torch.linalg.vector_norm(points, dim=1, keepdim=True, dtype=torch.float64)
    return points / norms.masked_fill(norms == 0, 1).to(points.dtype)


def sampled(points: Tensor, sample: int | None, name: str = "points") -> Tensor:
    """The points, checked; ``sample`` of them, always the same ones, where there are more."""
    check_points(name, points)
    if sample is None or len(points) <= sample:
        return points
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:sample]
    return points[chosen.sort().values.to(points.device)]
