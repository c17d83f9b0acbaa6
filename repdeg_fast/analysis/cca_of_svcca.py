"""PWCCA as google/svcca computes it: see ``convention`` of :func:`repdeg_fast.analysis.pwcca`."""

from __future__ import annotations

import numpy as np
import torch

from repdeg_fast.analysis.cca import CanonicalCorrelations
from repdeg_fast.analysis.covariances import Covariances


def pwcca_of_svcca(covariances: Covariances, epsilon: float) -> CanonicalCorrelations:
    """In NumPy, as there: the signs of its singular vectors enter the result where the points are not centred."""
    n = covariances.points
    xx, xy, yy = (covariances.scatter(*sides).cpu().numpy() / (n - 1) for sides in ((0, 0), (0, 1), (1, 1)))
    largest_x, largest_y = np.abs(xx).max(), np.abs(yy).max()
    cross = xy / np.sqrt(largest_x * largest_y)
    sigma_x, sigma_y = xx / largest_x, yy / largest_y
    kept = np.diagonal(sigma_y) >= epsilon
    if not (np.diagonal(sigma_x) >= epsilon).all() or len(sigma_x) > kept.sum():
        raise ValueError(
            "convention: 'svcca' is not defined where y is narrower than x or a feature of x has a variance below"
            f" {epsilon} of the largest; got {len(sigma_x)} and {int(kept.sum())} features; exchange"
            " x and y, or use 'paper'"
        )
    whiteners = [_inverse_root(s + epsilon * np.eye(len(s))) for s in (sigma_x, sigma_y[kept][:, kept])]
    if not all(np.isfinite(one).all() for one in whiteners):
        raise ValueError(
            f"convention: 'svcca' is not defined for the dependent features of these {n} points ({len(sigma_x)} and"
            f" {int(kept.sum())} features): rounding decides its roots; raise threshold, or use 'paper'"
        )
    turn, correlations, _ = np.linalg.svd(whiteners[0] @ cross[:, kept] @ whiteners[1])
    mean = covariances.mean(0).cpu().numpy()
    shift = n * np.outer(mean, mean)  # row i of their directions is shifted by the mean of *feature* i
    gram = turn.T @ xx @ turn * (n - 1) + shift
    projections = np.linalg.solve(np.linalg.cholesky(gram), turn.T @ xx * (n - 1) + shift)  # QR without the n points
    weights = torch.from_numpy(np.abs(projections).sum(1))
    rho = torch.from_numpy(np.abs(correlations))
    return CanonicalCorrelations(rho, weights / weights.sum(), n, len(sigma_x), int(kept.sum()))


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.linalg.pinv(matrix))
    with np.errstate(invalid="ignore"):  # NaN of a negative value: the caller says so
        return (vectors * np.sqrt(values)) @ vectors.T
