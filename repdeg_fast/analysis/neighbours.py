"""Nearest neighbours by cosine, and what they say of representations: exact, and no N×N matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import check_points
from repdeg_fast.analysis.tiles import cosine_tiles
from repdeg_fast.contracts.neighbours import Nearest
from repdeg_fast.ops.neighbours import kernels

_ROWS = 1024  # of a block of the results


def nearest(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k other points of largest cosine: cosines (N, k), descending, and indices (N, k). Of equal cosines the lower
    indices come first; which of them are among the k, where not all are, is certain (the lowest) only with the C++
    kernels.

    Raises:
        ValueError: not a finite matrix, or not more than k points.
    """
    found = [(cosines, indices) for _, cosines, indices in nearest_by_rows(points, k)]
    return torch.cat([cosines for cosines, _ in found]), torch.cat([indices for _, indices in found])


def nearest_by_rows(points: Tensor, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """:func:`nearest`, a block of rows at a time."""
    found = _nearest(points, k)
    for start in range(0, len(points), _ROWS):
        values, index = (part[start : start + _ROWS] for part in found)
        index, order = index.sort(dim=1)
        values, descending = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        yield slice(start, start + len(index)), values, index.gather(1, descending)


def _nearest(points: Tensor, k: int) -> Nearest:
    """In no order. Each tile of cosines is looked at twice: by its rows for these points, by its columns for those."""
    check_points("points", points)
    if not isinstance(k, int) or not 1 <= k < len(points):
        raise ValueError(f"k: expected 1 ≤ k < {len(points)}, the number of points, got {k}")
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    found = Nearest(
        torch.full((len(points), k), -torch.inf, dtype=dtype, device=points.device),
        torch.zeros((len(points), k), dtype=torch.int64, device=points.device),
    )
    look = kernels(points).look
    for i, j, tile in cosine_tiles(points):
        if i == j:
            tile.fill_diagonal_(-torch.inf)
        else:
            look(found.rows(j, tile.shape[1]), tile.T, i)
        look(found.rows(i, len(tile)), tile, j)
    return found


def token_identity(points: Tensor, tokens: Tensor, k: int = 50) -> float:
    """Share of the k nearest neighbours by cosine that are occurrences of the same token, averaged over the points: 1
    where tokens are islands. A token with m occurrences can reach (m − 1)/k at most.

    Args:
        points: (N, d).
        tokens: (N,) integers.

    Raises:
        ValueError: unequal lengths, NaN, or not more than k points.
    """
    _check_labels("tokens", tokens, points)
    total = 0
    indices = _nearest(points, k).indices
    for some, own in zip(indices.split(_ROWS), tokens.split(_ROWS), strict=True):
        total += int((tokens[some] == own[:, None]).sum())
    return total / (len(points) * k)


def position_distance(points: Tensor, positions: Tensor, tokens: Tensor | None = None, k: int = 50) -> float:
    """Mean distance between a point's position in its sentence and those of its k nearest neighbours by cosine: 0
    where representations say the position.

    With ``tokens`` (N,) neighbours are looked for among the occurrences of the same token, at most k and all there
    are; tokens that occur once are left out. :func:`position_distance_by_chance` is what neighbours drawn at random
    give.
    """
    _check_labels("positions", positions, points)
    total, count = 0.0, 0
    for group in _groups(points, tokens):
        places = positions[group]
        for rows, _, indices in nearest_by_rows(points[group], min(k, len(group) - 1)):
            total += float((places[indices] - places[rows, None]).abs().sum())
            count += indices.numel()
    if not count:
        raise ValueError(
            f"points: expected at least 2, got {len(points)}"
            if tokens is None
            else "tokens: expected some that occur twice, found none"
        )
    return total / count


def position_distance_by_chance(positions: Tensor, tokens: Tensor | None = None, k: int = 50) -> float:
    """What :func:`position_distance` is for neighbours drawn at random, exactly; NaN where no point has another one to
    be near to."""
    _check_labels("positions", positions, positions)
    total, count = 0.0, 0
    for group in _groups(positions, tokens):
        n, places = len(group), positions[group].double().sort().values
        pairs = float((places * (2 * torch.arange(n, device=places.device) - n + 1)).sum())  # Σ over i < j
        neighbours = min(k, n - 1)
        total += 2 * pairs / (n - 1) * neighbours
        count += n * neighbours
    return total / count if count else float("nan")


def _groups(points: Tensor, tokens: Tensor | None) -> Iterator[Tensor]:
    """Indices of the points of each token that has two or more; of all where there are no tokens."""
    if tokens is None:
        tokens = torch.zeros(len(points), dtype=torch.long, device=points.device)
    _check_labels("tokens", tokens, points)
    order = tokens.sort(stable=True).indices
    for group in order.split(tokens.unique(return_counts=True)[1].tolist()):
        if len(group) > 1:
            yield group


@dataclass(frozen=True)
class Hubness:
    """How often points are among the k nearest of others: k on average, unevenly where there are hubs."""

    skewness: float  # of the k-occurrence (Radovanović et al., 2010): about 0 without hubs
    largest: int  # the k-occurrence of the greatest hub
    orphans: float  # share of points that are nobody's neighbour


def hubness(points: Tensor, k: int = 10) -> Hubness:
    """Of the k-nearest-neighbour graph by cosine.

    Raises:
        ValueError: NaN, or not more than k points.
    """
    occurrences = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _, _, indices in nearest_by_rows(points, k):
        occurrences += indices.flatten().bincount(minlength=len(points))
    deviation = occurrences.double() - occurrences.double().mean()
    spread = deviation.square().mean().sqrt()
    skewness = float(deviation.pow(3).mean() / spread**3) if spread > 0 else 0.0
    return Hubness(skewness, int(occurrences.max()), float((occurrences == 0).double().mean()))


def _check_labels(name: str, labels: Tensor, points: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name}: expected a vector of integers, one a point, got {got}")
    if len(labels) != len(points):
        raise ValueError(f"{name}: expected {len(points)}, one a point, got {len(labels)}")
