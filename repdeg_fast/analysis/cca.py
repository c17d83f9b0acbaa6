"""Canonical correlations of two representations of the same points: CCA, SVCCA and PWCCA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import Covariances, check_varies, paired

_THRESHOLD = 1e-10  # variances below this share of the largest are rounding of float32 inputs, not directions


@dataclass(frozen=True)
class CanonicalCorrelations:
    """Correlations ρ (k,), descending, and their mean under the measure's weights."""

    correlations: Tensor  # (k,) float64, k the smaller rank
    weights: Tensor  # (k,) float64, sum 1
    points: int
    rank_x: int  # directions of x with variance above the threshold
    rank_y: int

    @property
    def similarity(self) -> float:
        return float((self.weights * self.correlations).sum())

    @property
    def distance(self) -> float:
        return 1 - self.similarity

    @property
    def forced(self) -> int:
        """How many correlations are 1 whatever the data: with few points any two representations agree."""
        return max(0, min(self.rank_x, self.rank_y, self.rank_x + self.rank_y - (self.points - 1)))


def cca(x: Tensor | Covariances, y: Tensor | None = None, *, threshold: float = _THRESHOLD) -> CanonicalCorrelations:
    """Mean canonical correlation.

    The ρ are the singular values of Σxx^-½ Σxy Σyy^-½, after directions whose variance is below ``threshold`` times
    the side's largest have been removed: constant, duplicate and dependent features, and fewer points than features,
    are no error; ``rank_x``, ``rank_y`` and ``forced`` say what was left.

    Args:
        x, y: (n, d) and (n, e), row i of both the same point; or one ``Covariances`` of two sides.
        threshold: Relative to the largest variance; 0 < threshold < 1.

    Raises:
        ValueError: unequal point counts, fewer than two points, NaN, or a side whose points are all the same.
    """
    found = _Whitened.of(paired(x, y), threshold)
    return found.weighted(torch.ones_like(found.correlations))


def svcca(
    x: Tensor | Covariances, y: Tensor | None = None, *, share: float = 0.99, threshold: float = _THRESHOLD
) -> CanonicalCorrelations:
    """:func:`cca` of the leading principal components of each side that hold ``share`` of its variance
    (1706.05806)."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    found = _Whitened.of(paired(x, y), threshold, share)
    return found.weighted(torch.ones_like(found.correlations))


def pwcca(
    x: Tensor | Covariances,
    y: Tensor | None = None,
    *,
    threshold: float = _THRESHOLD,
    convention: str = "paper",
) -> CanonicalCorrelations:
    """Projection-weighted canonical correlation (Morcos et al., 1806.05759); ``.distance`` is 1 − Σ α_i ρ_i.

    α_i ∝ Σ_j |⟨h_i, z_j⟩|, with h_i the centred, unit-norm canonical variates of the side of smaller rank (of x where
    they tie) and z_j that side's own centred features. Arguments and errors are those of :func:`cca`.

    ``convention="svcca"`` gives what google/svcca's ``compute_pwcca(x.T, y.T, epsilon=threshold)`` computes instead:
    threshold added to the variances, directions without Σxx^-½, weights from uncentred points. It has no answer
    where y is narrower or a feature of x varies less than that: a ValueError here, an IndexError or a wrong side
    there. It needs NumPy.
    """
    covariances = paired(x, y)
    if convention == "svcca":
        from repdeg_fast.analysis.cca_of_svcca import pwcca_of_svcca  # the one that needs NumPy

        return pwcca_of_svcca(covariances, threshold)
    if convention != "paper":
        raise ValueError(f"convention: expected 'paper' or 'svcca', got {convention!r}")
    found = _Whitened.of(covariances, threshold)
    return found.weighted(found.projections)


@dataclass(frozen=True)
class _Whitened:
    """The canonical correlations, and the canonical directions on the side of smaller rank (of x where they tie)."""

    points: int
    ranks: tuple[int, int]
    correlations: Tensor  # (k,)
    projections: Tensor  # (k,): Σ_j |⟨h_i, z_j⟩|

    @classmethod
    def of(cls, covariances: Covariances, threshold: float, share: float = 1.0) -> _Whitened:
        """With C = Wxᵀ Σxy Wy = U diag(ρ) Vᵀ, where Wᵀ Σ W = 1. The variates are h = z W U, so that hᵀz = Uᵀ Wᵀ Σ.

        U are the eigenvectors of C Cᵀ, and ρ the lengths of the rows of Uᵀ C: squares would cost the small ones half
        their digits.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: expected a number in (0, 1), got {threshold}")
        x, y = (_whitener(covariances, side, threshold, share) for side in (0, 1))
        cross = x.apply(y.apply(covariances.scatter(0, 1).T).T)
        narrower, cross = (y, cross.T) if y.rank < x.rank else (x, cross)
        turn = torch.linalg.eigh(cross @ cross.T).eigenvectors.T
        correlations, order = torch.linalg.vector_norm(turn @ cross, dim=1).sort(descending=True)
        projections = (turn[order] @ narrower.features).abs().sum(1)
        return cls(covariances.points, (x.rank, y.rank), correlations.clamp(max=1), projections)

    def weighted(self, weights: Tensor) -> CanonicalCorrelations:
        return CanonicalCorrelations(self.correlations, weights / weights.sum(), self.points, *self.ranks)


class _Whitener(NamedTuple):
    """W (d, r) with Wᵀ Σ W = 1, by what is done with it."""

    apply: Callable[[Tensor], Tensor]  # from (d, m): Wᵀ of it, (r, m)
    features: Tensor  # Wᵀ Σ (r, d)

    @property
    def rank(self) -> int:
        return len(self.features)


def _whitener(covariances: Covariances, side: int, threshold: float, share: float) -> _Whitener:
    """Any W will do for correlations; of full rank the inverse of a Cholesky factor, which costs far less than
    eigenvectors."""
    check_varies(covariances, side)
    scatter = covariances.scatter(side)
    if share == 1 and (lower := _factor(scatter, threshold)) is not None:
        return _Whitener(lambda matrix: torch.linalg.solve_triangular(lower, matrix, upper=False), lower.T)
    variances, directions = torch.linalg.eigh(scatter)
    variances, directions = variances.flip(0), directions.flip(1)
    rank = int((variances > threshold * variances[0]).sum())
    if share < 1:
        cumulative = variances[:rank].cumsum(0)
        rank = min(rank, int((cumulative < share * cumulative[-1]).sum()) + 1)
    scale, directions = variances[:rank].sqrt(), directions[:, :rank]
    return _Whitener(lambda matrix: (directions / scale).T @ matrix, (directions * scale).T)


def _factor(scatter: Tensor, threshold: float) -> Tensor | None:
    """L with L Lᵀ = ``scatter``, if that shows that no variance is below the threshold: the least is at least
    1/‖L⁻¹‖²_F, the largest at most the trace."""
    lower, failed = torch.linalg.cholesky_ex(scatter)
    if failed:
        return None
    one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False)
    return lower if 1 / float(inverse.square().sum()) > threshold * float(scatter.trace()) else None
