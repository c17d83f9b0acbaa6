"""Linear centred kernel alignment (Kornblith et al., 1905.00414), from covariances: no n×n Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import Covariances, check_varies, paired


def linear_cka(x: Tensor | Covariances, y: Tensor | None = None, *, unbiased: bool = False) -> float:
    """1 for representations equal up to rotation, shift and scale; 0 for uncorrelated ones.

    ‖Σxy‖² / (‖Σxx‖ ‖Σyy‖) in Frobenius norms. It grows where there are few points for many features; ``unbiased=True``
    puts Song et al.'s unbiased HSIC in place of all three (as Nguyen et al., 2010.15327), in its exact feature-space
    form, and can be a little below 0.

    Args:
        x, y: (n, d) and (n, e), row i of both the same point; or one ``Covariances`` of two sides.

    Raises:
        ValueError: unequal point counts, NaN, fewer than 2 points (4 unbiased), a side whose points are all the same.
    """
    return float(cka_matrix(paired(x, y, least=_least(unbiased)), unbiased=unbiased)[0, 1])


def cka_matrix(covariances: Covariances, *, unbiased: bool = False) -> Tensor:
    """:func:`linear_cka` of all pairs of sides, of the layers of a model say: (L, L) in float64, symmetric, each HSIC
    computed once. NaN where there are too few points: an unbiased estimate of something positive may be negative.

    Raises:
        ValueError: fewer than 2 points (4 unbiased), a side whose points are all the same, sides too far apart to have
            been kept (``band``).
    """
    if covariances.points < _least(unbiased):
        raise ValueError(f"points: expected at least {_least(unbiased)}, got {covariances.points}")
    sides = range(len(covariances))
    hsic = torch.zeros(len(sides), len(sides), dtype=torch.float64)
    for i in sides:
        check_varies(covariances, i)
        for j in range(i, len(sides)):
            found = covariances.unbiased_hsic(i, j) if unbiased else float(covariances.scatter(i, j).square().sum())
            hsic[i, j] = hsic[j, i] = found
    scale = hsic.diagonal().sqrt()  # NaN of a negative one
    return hsic / scale / scale[:, None]


def _least(unbiased: bool) -> int:
    return 4 if unbiased else 2
