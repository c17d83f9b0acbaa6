"""The native kernels of ADMIN's residual block: csrc/cpu/admin_norm.cpp and csrc/cuda/admin_norm.cu."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.admin_norm import Affine, Dropout, Gradients, Norm, Residual, Saved
from repdeg_fast.native import Namespace


class Kernels:
    def __init__(self, operators: Namespace) -> None:
        self._forward, self._backward = operators.admin_norm_forward.default, operators.admin_norm_backward.default

    def forward(
        self, residual: Residual, affine: Affine, dropout: Dropout, norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, branch, omega, branch_bias = residual
        y, mean, rstd = self._forward(x, branch, omega, *affine, branch_bias, *dropout, *norm)
        return y, mean, rstd

    def backward(self, gradients: Gradients, grad_y: Tensor, saved: Saved, dropout: Dropout, *, center: bool) -> None:
        *inputs, mean, rstd = saved
        self._backward(*gradients, grad_y, *inputs, dropout.seed, mean, rstd, dropout.p, center)
