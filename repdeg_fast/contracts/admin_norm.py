"""The contract of ADMIN's residual block. Mathematics: :mod:`repdeg_fast.reference.admin_norm`.

Matrices are (N, d) with rows of unit stride in one dtype; parameters are (d,), contiguous, in the arithmetic dtype;
``None`` stands for 1 (ω, γ) or 0 (β, branch bias).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Residual(NamedTuple):
    """z = x ⊙ ω + dropout(branch + branch_bias)."""

    x: Tensor
    branch: Tensor
    omega: Tensor | None
    branch_bias: Tensor | None


class Affine(NamedTuple):
    """y = n ⊙ γ + β."""

    weight: Tensor | None
    bias: Tensor | None


class Dropout(NamedTuple):
    seed: Tensor | None  # one int64; None: no dropout
    p: float


class Norm(NamedTuple):
    eps: float
    center: bool  # False: RMSNorm


class Saved(NamedTuple):
    """What a backward pass starts from: n is made from ``y``, γ and β where ``y`` is there, else from ``x``, the branch
    and the mean. ``x`` is there as well where ω wants a gradient."""

    y: Tensor | None
    x: Tensor | None
    branch: Tensor | None
    omega: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    branch_bias: Tensor | None
    mean: Tensor | None  # μ (N,)
    rstd: Tensor  # 1/σ (N,)


class Wanted(NamedTuple):
    """Which gradients are wanted beside that of x."""

    branch: bool
    omega: bool
    weight: bool
    bias: bool
    branch_bias: bool


# Of x, the branch, ω, γ, β and the branch bias, each in memory of its own; one that is not wanted is empty.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Kernels(Protocol):
    def forward(
        self, residual: Residual, affine: Affine, dropout: Dropout, norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y (N, d) in the dtype of x; μ (N,), 0 for RMSNorm, and 1/σ (N,) in fp32 (float64 for float64)."""

    def backward(self, wanted: Wanted, grad_y: Tensor, saved: Saved, dropout: Dropout, *, center: bool) -> Gradients:
        """``grad_y``: contiguous."""
