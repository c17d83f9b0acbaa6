"""CosReg's contract. Mathematics: :mod:`repdeg_fast.reference.cosreg`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Rows(NamedTuple):
    """The vectors that are regularized."""

    weight: Tensor  # (N, d)
    row_weight: Tensor | None  # p (N,), contiguous, in the arithmetic dtype; None: 1
    eps: float


class Sums(NamedTuple):
    """What a forward pass finds, in fp32 (float64 for float64)."""

    value: Tensor  # R ()
    column_sum: Tensor  # s (d,)
    inverse_norm: Tensor  # 1/max(‖w‖, eps) (N,); 0 for zero rows
    total_weight: Tensor  # P ()


class Saved(NamedTuple):
    """What a backward pass starts from."""

    column_sum: Tensor
    inverse_norm: Tensor
    total_weight: Tensor | None  # None: N


class Kernels(Protocol):
    def forward(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of :class:`Sums`."""

    def backward(self, grad_weight: Tensor, grad_value: Tensor, rows: Rows, saved: Saved, *, accumulate: bool) -> None:
        """Write grad_value · ∂R/∂W over ``grad_weight`` (N, d), or add it where ``accumulate``."""
