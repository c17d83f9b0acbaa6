"""Cosines of all pairs of points, a tile at a time: the one place that knows how they are made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import CHUNK, check_points

SIDE = {"cpu": 1024}  # of a tile: 4 MiB in float32, which stay in the cache
_SIDE = 8192  # where launches cost


def cosine_tiles(points: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (i, j, tile), i ≤ j: tile[a, b] is the cosine of points i + a and j + b. Each unordered pair of points is
    in one tile, but in those with i = j twice; i and j ascend. A tile is the next one's memory.

    Beyond the inputs a tile and two panels of unit rows are in memory. A zero row has cosine 0 with everything.
    """
    side = SIDE.get(points.device.type, _SIDE)
    norms = _norms(points)
    buffer = torch.empty(0)
    for i in range(0, len(points), side):
        rows = _unit(points[i : i + side], norms[i : i + side])
        for j in range(i, len(points), side):
            columns = rows if i == j else _unit(points[j : j + side], norms[j : j + side])
            if buffer.shape != (len(rows), len(columns)):
                buffer = rows.new_empty(len(rows), len(columns))
            yield i, j, torch.mm(rows, columns.T, out=buffer)


def pair_tiles(points: Tensor) -> Iterator[Tensor]:
    """The cosines of every unordered pair i < j of different points, once each, as vectors."""
    for i, j, tile in cosine_tiles(points):
        yield tile[torch.ones_like(tile, dtype=torch.bool).triu(1)] if i == j else tile.flatten()


def unit_rows(points: Tensor) -> Tensor:
    """Of length 1, or 0 for a zero row, in float32 at least."""
    return _unit(points, _norms(points))


def _norms(points: Tensor) -> Tensor:
    """(N, 1), 1 for a zero row. In float64: squares of 1e30 or 1e-30 leave fp32's range."""
    points = points.detach()
    found = points.new_empty(len(points), 1, dtype=torch.float64)  # at once: results between copies leave holes
    for rows, out in zip(points.split(CHUNK // 8), found.split(CHUNK // 8), strict=True):
        torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64, out=out)
    return found.masked_fill_(found == 0, 1)


def _unit(points: Tensor, norms: Tensor) -> Tensor:
    points = points.detach()
    points = points if points.dtype == torch.float64 else points.float()
    return points / norms.to(points.dtype)


def sampled(points: Tensor, sample: int | None, name: str = "points") -> Tensor:
    """The points, checked; ``sample`` of them, always the same ones, where there are more."""
    check_points(name, points)
    if sample is not None and sample < 2:
        raise ValueError(f"sample: expected at least 2 points, got {sample}")
    if sample is None or len(points) <= sample:
        return points
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:sample]
    return points[chosen.sort().values.to(points.device)]
