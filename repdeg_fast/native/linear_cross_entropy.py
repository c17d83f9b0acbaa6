"""The native row kernel of the linear cross entropy: csrc/cpu/linear_cross_entropy.cpp, products by csrc/cpu/gemm.h."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, weight_of_targets
from repdeg_fast._checks import wrong_target
from repdeg_fast.contracts.linear_cross_entropy import Columns, Head, LogitBlock, LossRule
from repdeg_fast.native import Namespace, products

_ALL_WEIGH_ONE = (None, None)


class Products:
    """What goes around a row kernel."""

    def __init__(self, operators: Namespace) -> None:
        self._operators = operators
        self._multiply = operators.linear_cross_entropy_multiply.default
        self._add = operators.linear_cross_entropy_add.default
        self._advise = operators.linear_cross_entropy_advise.default

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        products.settle(self._operators)
        self._multiply(out, a, b, accumulate)

    def add(self, total: Tensor, product: Tensor) -> None:
        if total.dtype == arithmetic_dtype(product):
            self._add(total, product)
        else:  # a sum in 16 bits, of one product that is not the first, or because it was asked for
            total.add_(product)

    def advise(self, fresh: Tensor) -> None:
        self._advise(fresh)


class RowKernels(Products):
    wide_logits = False

    def __init__(self, operators: Namespace) -> None:
        super().__init__(operators)
        self._rows = operators.linear_cross_entropy_rows.default
        self._count = operators.linear_cross_entropy_count.default
        self._total = operators.linear_cross_entropy_total.default

    def rows(self, block: LogitBlock, columns: Columns, rule: LossRule, *, accumulate_bias: bool) -> None:
        logits, lse, loss, grad_bias, target, first_row, bias, grad_loss, grad_lse, _, of_square, predicted = block
        ignore_index, label_smoothing, softcap, class_weight, gradient_filter = rule
        self._rows(
            logits, lse, loss, grad_bias, predicted, target, bias, grad_loss, grad_lse, of_square,
            *(class_weight or _ALL_WEIGH_ONE), columns.vocabulary, first_row, columns.first, ignore_index,
            label_smoothing, softcap, gradient_filter, accumulate_bias,
        )  # fmt: skip

    def share(self, head: Head, rule: LossRule, mean: bool) -> Tensor:
        counted = self._count(head.target, head.weight.shape[0], rule.ignore_index)
        if counted < 0:
            raise wrong_target(int(head.target[-1 - counted]), head.weight.shape[0], rule.ignore_index)
        if mean and rule.class_weight is not None:
            return 1 / weight_of_targets(head.target, rule.ignore_index, rule.class_weight.each)
        dtype = arithmetic_dtype(head.hidden_states)
        return head.hidden_states.new_full((), 1 / max(counted, 1) if mean else 1.0, dtype=dtype)

    def total(self, losses: Tensor, heads: int, share: Tensor) -> Tensor:
        total: Tensor = self._total(losses, heads, share)
        return total
