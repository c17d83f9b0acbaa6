"""How many directions representations use: singular values and what is computed from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import CHUNK, Covariances


def covariances_of(points: Tensor | Covariances) -> Covariances:
    """Of one side; those given, or of a matrix of points."""
    if not isinstance(points, Covariances):
        points = Covariances(["points"]).update(points)
    if points.points == 0:
        raise ValueError("points: expected some, got none")
    return points


def singular_values(points: Tensor | Covariances, *, centred: bool = False) -> Tensor:
    """(d,) float64, descending, of the (N, d) matrix; of the matrix less its mean row if ``centred``. From the d×d
    moments in float64, so that values below 1e-8 of the largest are rounding."""
    covariances = covariances_of(points)
    moment = covariances.scatter() if centred else covariances.second_moment()
    return torch.linalg.eigvalsh(moment).clamp_min(0).sqrt().flip(0)


def effective_rank(points: Tensor | Covariances, *, centred: bool = False) -> float:
    """RankMe (Garrido et al., 2210.02885; Roy and Vetterli, 2007): exp of the entropy of σ/Σσ, without the ε that
    RankMe adds to each share. d where all directions are used alike, 1 where one is, 0 where none is. A vector is
    taken as the σ themselves."""
    values = _values(points, centred)
    if not values.any():
        return 0.0
    share = values[values > 0] / values.sum()
    return float((-(share * share.log()).sum()).exp())


def participation_ratio(points: Tensor | Covariances, *, centred: bool = False) -> float:
    """(Σ σ²)² / Σ σ⁴, the same idea with far more weight on the large ones."""
    energy = _values(points, centred).square()
    return float(energy.sum() ** 2 / energy.square().sum()) if energy.any() else 0.0


def directions_for(points: Tensor | Covariances, share: float, *, centred: bool = False) -> int:
    """How many leading directions hold ``share`` of Σ σ²; 0 where that is 0."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    cumulative = _values(points, centred).square().cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum()) + 1 if cumulative[-1] > 0 else 0


def isoscore(points: Tensor | Covariances) -> float:
    """IsoScore (Rudman et al., 2108.07344): 1 where the d principal components have equal variances, 0 where one has
    all of it. NaN in one dimension and where nothing varies."""
    variances = singular_values(points, centred=True).square()
    d = len(variances)
    if d < 2 or not variances.any():
        return math.nan
    defect = (variances * math.sqrt(d) / variances.norm() - 1).norm() / math.sqrt(2 * (d - math.sqrt(d)))
    return float(((d - defect**2 * (d - math.sqrt(d))) ** 2 - d) / (d * (d - 1)))


def isotropy(points: Tensor) -> float:
    """Mu and Viswanath's I (1702.01417): min Z(c) / max Z(c) over the singular directions c, Z(c) = Σ_i exp(c·x_i);
    1 for isotropic points. A singular vector's sign is arbitrary, so both signs of each are taken; in logarithms, so
    that no norm is too large."""
    covariances = covariances_of(points)
    directions = torch.linalg.eigh(covariances.second_moment()).eigenvectors
    logarithms = torch.full((2 * len(directions),), -math.inf, dtype=torch.float64, device=points.device)
    for rows in points.split(CHUNK):
        products = rows.double() @ directions
        both = torch.cat([products.logsumexp(0), (-products).logsumexp(0)])
        logarithms = torch.logaddexp(logarithms, both)
    return float((logarithms.min() - logarithms.max()).exp())


def cone_projection(points: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (N, 2) of the points in the plane of their two leading right singular vectors, seen from the
    origin, and that plane (d, 2). Singular vectors have no sign: these are turned so that the mean point is up
    right."""
    plane = leading_plane(covariances_of(points))
    return torch.cat([rows.double() @ plane for rows in points.split(CHUNK)]), plane


def leading_plane(covariances: Covariances) -> Tensor:
    """(d, 2), the plane of :func:`cone_projection`; a second column of zeros for d = 1."""
    mean = covariances.mean()
    plane = mean.new_zeros(len(mean), 2)
    plane[:, : min(2, len(mean))] = torch.linalg.eigh(covariances.second_moment()).eigenvectors.flip(1)[:, :2]
    return plane * torch.where(mean @ plane < 0, -1.0, 1.0)


def _values(points: Tensor | Covariances, centred: bool) -> Tensor:
    if isinstance(points, Tensor) and points.dim() == 1:
        return points
    return singular_values(points, centred=centred)
