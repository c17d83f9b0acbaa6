"""CosReg's native kernels: csrc/cpu/cosreg.cpp and csrc/cuda/cosreg.cu."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.cosreg import Rows, Saved, Sums
from repdeg_fast.native import Namespace


class Kernels:
    def __init__(self, operators: Namespace) -> None:
        self._forward, self._backward = operators.cosreg_forward.default, operators.cosreg_backward.default

    def forward(self, rows: Rows) -> Sums:
        return Sums(*self._forward(*rows))

    def backward(self, grad_weight: Tensor, grad_value: Tensor, rows: Rows, saved: Saved, *, accumulate: bool) -> None:
        weight, row_weight, eps = rows
        self._backward(grad_weight, grad_value, weight, row_weight, *saved, eps, accumulate)
