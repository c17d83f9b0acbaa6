"""Rare tokens beside frequent ones: degeneration is worst for those that training seldom sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repdeg_fast.analysis.cosines import average_cosine, direction_sum
from repdeg_fast.analysis.covariances import check_points


@dataclass(frozen=True)
class Group:
    """Some tokens' rows of an embedding."""

    name: str  # never, rare, frequent
    tokens: int
    average_cosine: float
    mean_norm: float
    cosine_to_frequent: float  # of the groups' mean directions


def rare_against_frequent(points: Tensor, counts: Tensor, share: float = 0.2) -> list[Group]:
    """Measures of the tokens that never occur, the rare, and the frequent ones: the ``share`` of the tokens that do
    occur with the highest counts. Groups without tokens are left out.

    Args:
        points: (V, d), an embedding.
        counts: (V,), how often each token occurs.

    Raises:
        ValueError: unequal lengths, negative counts, none above 0, or NaN.
    """
    check_points("points", points)
    check_counts(counts, len(points))
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number in (0, 1), got {share}")
    order = counts.sort(descending=True, stable=True).indices
    seen = int((counts > 0).sum())
    frequent = max(1, round(share * seen))
    parts = {"never": order[seen:], "rare": order[frequent:seen], "frequent": order[:frequent]}
    reference = direction_sum(points[parts["frequent"]])[0]
    return [_group(name, points[chosen], reference) for name, chosen in parts.items() if len(chosen)]


def _group(name: str, points: Tensor, reference: Tensor) -> Group:
    direction = direction_sum(points)[0]
    cosine = torch.nn.functional.cosine_similarity(direction, reference, dim=0)
    norm = sum(float(rows.double().norm(dim=1).sum()) for rows in points.split(4096)) / len(points)
    return Group(name, len(points), average_cosine(points), norm, float(cosine))


def frequency_bins(counts: Tensor, bins: int) -> Tensor:
    """(V,): the bin of each token, 0 the rarest, so that the bins hold about equally many *occurrences*; −1 for tokens
    that never occur.

    Raises:
        ValueError: ``counts`` is no vector, has none above 0, or one that is negative or NaN; ``bins`` < 1.
    """
    if not isinstance(counts, Tensor) or counts.dim() != 1 or not len(counts):
        got = f"shape {tuple(counts.shape)}" if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts: expected a vector (V,), how often each token occurs, got {got}")
    check_counts(counts, len(counts))
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    order = counts.sort(stable=True).indices
    ordered = counts[order].double()
    middle = (ordered.cumsum(0) - ordered / 2) / ordered.sum()
    out = torch.empty_like(order)
    out[order] = (middle * bins).long().clamp(0, bins - 1)
    return out.masked_fill(counts == 0, -1)


def check_counts(counts: Tensor, expected: int) -> None:
    if not isinstance(counts, Tensor) or counts.shape != (expected,):
        got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts: expected a vector of {expected}, one a token, got {got}")
    if counts.min() < 0 or not torch.isfinite(counts.double()).all() or counts.max() <= 0:
        raise ValueError(
            "counts: expected none below 0 and some above, got none above 0 or one that is negative or NaN"
        )
