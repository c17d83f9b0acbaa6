"""The native row kernel of the linear cross entropy: csrc/cpu/linear_cross_entropy.cpp, products by csrc/cpu/gemm.h."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Columns, LogitBlock, LossRule
from repdeg_fast.native import Namespace


class Products:
    """What goes around a row kernel."""

    def __init__(self, operators: Namespace) -> None:
        self._multiply = operators.linear_cross_entropy_multiply.default
        self._add = operators.linear_cross_entropy_add.default
        self._advise = operators.linear_cross_entropy_advise.default

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        self._multiply(out, a, b, accumulate)

    def add(self, total: Tensor, product: Tensor) -> None:
        self._add(total, product)

    def advise(self, fresh: Tensor) -> None:
        self._advise(fresh)


class RowKernels(Products):
    def __init__(self, operators: Namespace) -> None:
        super().__init__(operators)
        self._rows = operators.linear_cross_entropy_rows.default

    def rows(self, block: LogitBlock, columns: Columns, rule: LossRule, *, accumulate_bias: bool) -> None:
        logits, lse, loss, grad_bias, target, first_row, bias, grad_loss, grad_lse = block
        self._rows(
            logits, lse, loss, grad_bias, target, bias, grad_loss, grad_lse, columns.vocabulary, first_row,
            columns.first, *rule, accumulate_bias,
        )  # fmt: skip
