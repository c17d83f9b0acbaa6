"""Canonical correlations of two representations of the same points: CCA, SVCCA and PWCCA."""

from __future__ import annotations

from dataclasses import dataclass

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
    return found.weighted(found.projections())


@dataclass(frozen=True)
class _Whitened:
    """The singular value decomposition of Λx^-½ Vxᵀ Σxy Vy Λy^-½, where Σxx = Vx Λx Vxᵀ, and likewise y."""

    points: int
    x: tuple[Tensor, Tensor]  # variances (r,) and directions (d, r)
    y: tuple[Tensor, Tensor]
    left: Tensor  # (rank of x, k)
    correlations: Tensor  # (k,)
    right: Tensor  # (k, rank of y)

    @classmethod
    def of(cls, covariances: Covariances, threshold: float, share: float = 1.0) -> _Whitened:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: expected a number in (0, 1), got {threshold}")
        x, y = (_directions(covariances, side, threshold, share) for side in (0, 1))
        cross = (x[1] * x[0].rsqrt()).T @ covariances.scatter(0, 1) @ (y[1] * y[0].rsqrt())
        left, correlations, right = torch.linalg.svd(cross, full_matrices=False)
        return cls(covariances.points, x, y, left, correlations.clamp(max=1), right)

    def weighted(self, weights: Tensor) -> CanonicalCorrelations:
        weights = weights / weights.sum()
        return CanonicalCorrelations(self.correlations, weights, self.points, len(self.x[0]), len(self.y[0]))

    def projections(self) -> Tensor:
        """(k,): Σ_j |⟨h_i, z_j⟩|. The variates are h = z Vx Λx^-½ U, so that hᵀz = Uᵀ Λx^½ Vxᵀ."""
        narrower_y = len(self.y[0]) < len(self.x[0])
        (variances, directions), turn = (self.y, self.right) if narrower_y else (self.x, self.left.T)
        return (turn @ (directions * variances.sqrt()).T).abs().sum(1)


def _directions(covariances: Covariances, side: int, threshold: float, share: float) -> tuple[Tensor, Tensor]:
    check_varies(covariances, side)
    variances, directions = torch.linalg.eigh(covariances.scatter(side))
    variances, directions = variances.flip(0), directions.flip(1)
    rank = int((variances > threshold * variances[0]).sum())
    if share < 1:
        cumulative = variances[:rank].cumsum(0)
        rank = min(rank, int((cumulative < share * cumulative[-1]).sum()) + 1)
    return variances[:rank], directions[:, :rank]
