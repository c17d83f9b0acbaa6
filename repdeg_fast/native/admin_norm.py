"""The native kernels of ADMIN's residual block: csrc/cpu/admin_norm.cpp and csrc/cuda/admin_norm_*.cu."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.admin_norm import Affine, Dropout, Gradients, Norm, Residual, Saved, Wanted
from repdeg_fast.native import Namespace


class Kernels:
    def __init__(self, operators: Namespace) -> None:
        self._forward, self._backward = operators.admin_norm_forward.default, operators.admin_norm_backward.default

    def forward(
        self, residual: Residual, affine: Affine, dropout: Dropout, norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, branch, omega, branch_bias = residual
        made: tuple[Tensor, Tensor, Tensor] = self._forward(x, branch, omega, *affine, branch_bias, *dropout, *norm)
        return made

    def backward(self, wanted: Wanted, grad_y: Tensor, saved: Saved, dropout: Dropout, *, center: bool) -> Gradients:
        seed, p = dropout
        made: Gradients = self._backward(grad_y, *saved[:-2], seed, saved.mean, saved.rstd, p, center, *wanted)
        return made
