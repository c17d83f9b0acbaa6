"""Nearest neighbours by cosine, and what they say of representations: exact, and no N×N matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import check_points
from repdeg_fast.analysis.tiles import cosine_tiles

_GROUP = 16  # columns whose maximum is looked at first


def nearest(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k other points of largest cosine: cosines (N, k), descending, and indices (N, k).

    Raises:
        ValueError: not a finite matrix, or not more than k points.
    """
    found = [(cosines, indices) for _, cosines, indices in nearest_by_rows(points, k)]
    return torch.cat([cosines for cosines, _ in found]), torch.cat([indices for _, indices in found])


def nearest_by_rows(points: Tensor, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """:func:`nearest` a block of rows at a time, for sums that need not keep N×k of them."""
    check_points("points", points)
    if not 1 <= k < len(points):
        raise ValueError(f"k: expected 1 ≤ k < {len(points)}, the number of points, got {k}")
    best: tuple[Tensor, Tensor] | None = None
    for i, j, tile in cosine_tiles(points, points):
        rows = torch.arange(i, i + len(tile), device=tile.device)
        own = (rows >= j) & (rows < j + tile.shape[1])
        tile[own.nonzero()[:, 0], rows[own] - j] = -torch.inf
        cosines, indices = _largest(tile, k)
        indices = indices + j
        if best is not None:
            cosines, indices = torch.cat([best[0], cosines], 1), torch.cat([best[1], indices], 1)
            cosines, chosen = cosines.topk(k, dim=1)
            indices = indices.gather(1, chosen)
        best = cosines, indices
        if j + tile.shape[1] == len(points):
            yield slice(i, i + len(tile)), *best
            best = None


def _largest(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, columns) largest of each row and where they are. Exact, but ``topk`` sees a sixteenth of the row:
    the k largest lie in the k groups with the largest maxima, and a group's columns are strided so that maxima
    vectorize."""
    rows, columns = tile.shape
    width = columns // _GROUP
    if width < 2 * k:
        return tile.topk(min(k, columns), dim=1)
    grouped = tile[:, : width * _GROUP].view(rows, _GROUP, width)
    groups = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    starts = torch.arange(_GROUP, device=tile.device) * width
    candidates = (groups[:, :, None] + starts).flatten(1)
    rest = torch.arange(width * _GROUP, columns, device=tile.device).expand(rows, -1)
    candidates = torch.cat([candidates, rest], 1)
    values, chosen = tile.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, chosen)


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
    for rows, _, indices in nearest_by_rows(points, k):
        total += int((tokens[indices] == tokens[rows, None]).sum())
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
        raise ValueError("tokens: expected some that occur twice, found none")
    return total / count


def position_distance_by_chance(positions: Tensor, tokens: Tensor | None = None, k: int = 50) -> float:
    """What :func:`position_distance` is for neighbours drawn at random, exactly."""
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
        yield torch.arange(len(points), device=points.device)
        return
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
