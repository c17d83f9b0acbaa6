"""Linear centred kernel alignment (Kornblith et al., 1905.00414), from covariances: no n×n Gram matrix."""

from __future__ import annotations

import math

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
    covariances = paired(x, y, least=4 if unbiased else 2)
    for side in (0, 1):
        check_varies(covariances, side)
    if unbiased:
        both, first, second = (covariances.unbiased_hsic(*sides) for sides in ((0, 1), (0, 0), (1, 1)))
        if min(first, second) <= 0:
            return math.nan  # too few points: an unbiased estimate of something positive may be negative
        return both / math.sqrt(first * second)
    return float(
        covariances.scatter(0, 1).square().sum() / (covariances.scatter(0).norm() * covariances.scatter(1).norm())
    )
