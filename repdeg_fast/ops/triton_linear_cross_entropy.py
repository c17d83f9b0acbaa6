"""The Triton kernels of the linear cross entropy in the form of its contract: streaming ones of their own, and a row
kernel for chunks. Imported where Triton is to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Columns, Gradients, Head, LogitBlock, LossRule, Upstream, Wanted
from repdeg_fast.ops.chunked_logits import ChunkedLogits, LibraryProducts

if TYPE_CHECKING:
    from triton_kernels import linear_cross_entropy as launchers
else:
    from repdeg_fast.triton_kernels import linear_cross_entropy as launchers


class RowKernels(LibraryProducts):
    def rows(self, block: LogitBlock, columns: Columns, rule: LossRule, *, accumulate_bias: bool) -> None:
        logits, lse, loss, grad_bias, target, first_row, bias, grad_loss, grad_lse = block
        assert loss is not None  # whole rows, with gradients: streaming passes have kernels of their own
        assert grad_loss is not None
        assert grad_lse is None
        launchers.rows(
            logits, lse, loss, grad_bias, target, bias, grad_loss, grad_lse, columns.vocabulary, first_row,
            columns.first, *rule, accumulate_bias,
        )  # fmt: skip


class Kernels(ChunkedLogits):
    def __init__(self) -> None:
        super().__init__(RowKernels())

    def forward(self, head: Head, rule: LossRule) -> tuple[Tensor, Tensor]:
        return launchers.forward(*head, *rule)

    def backward(self, upstream: Upstream, head: Head, lse: Tensor, rule: LossRule, wanted: Wanted) -> Gradients:
        *needs, accumulate_dtype = wanted
        arguments: Any = (*upstream, *head, lse, *rule, needs, accumulate_dtype)
        hidden_states, weight, bias = launchers.backward(*arguments)
        return Gradients(hidden_states, weight, bias)

    def rescale_(
        self, gradients: Gradients, grad_heads: Tensor, grad_loss: Tensor, head: Head, rule: LossRule, wanted: Wanted
    ) -> None:
        *needs, accumulate_dtype = wanted
        launchers.rescale_(list(gradients), grad_heads, grad_loss, *head, *rule, needs, accumulate_dtype)
