"""The native row kernels of the measures over pairs: csrc/cpu/pairwise.cpp, products by csrc/cpu/gemm.h."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.pairwise import Block, Rule
from repdeg_fast.native import Namespace
from repdeg_fast.native.linear_cross_entropy import Products


class RowKernels(Products):
    def __init__(self, operators: Namespace) -> None:
        super().__init__(operators)
        self._measure, self._maxima = operators.pairwise_measure.default, operators.pairwise_maxima.default

    def measure(self, block: Block, rule: Rule, sums: Tensor, *, slopes: bool) -> None:
        cosines, keep_rows, keep_columns, diagonal, left_out = block
        kind, parameter, origin = rule
        self._measure(
            cosines, sums, keep_rows, keep_columns, origin, int(kind), parameter, diagonal, int(left_out), slopes
        )

    def maxima(self, block: Block, values: Tensor, index: Tensor) -> None:
        cosines, _, keep_columns, diagonal, left_out = block
        self._maxima(values, index, cosines, keep_columns, diagonal, int(left_out))
