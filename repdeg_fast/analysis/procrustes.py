"""How far two representations are from being the same up to rotation, shift and scale."""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast.analysis.covariances import Covariances, check_varies, paired


def procrustes(x: Tensor | Covariances, y: Tensor | None = None) -> float:
    """Orthogonal Procrustes distance (Ding et al., 2108.01661): min over rotations of ‖X − YQ‖², X and Y centred and
    of Frobenius norm 1. That is 2 − 2‖XᵀY‖_*: 0 for equal representations, at most 2.

    Args:
        x, y: (n, d) and (n, e), row i of both the same point (the narrower side counts as filled with zeros); or one
            ``Covariances`` of two sides.

    Raises:
        ValueError: unequal point counts, fewer than two points, NaN, or a side whose points are all the same.
    """
    covariances = paired(x, y)
    for side in (0, 1):
        check_varies(covariances, side)
    nuclear = torch.linalg.svdvals(covariances.scatter(0, 1)).sum()
    return float(2 - 2 * nuclear / (covariances.scatter(0).trace() * covariances.scatter(1).trace()).sqrt())
