"""The Triton kernels of the linear cross entropy in the form of its contract: a forward pass of their own, and a row
kernel for what the library multiplies. Imported where Triton is to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import (
    Columns,
    Gradients,
    GradRows,
    Head,
    LogitBlock,
    Look,
    LossRule,
    Upstream,
    Wanted,
)
from repdeg_fast.ops.chunked_logits import NOTHING, ChunkedLogits
from repdeg_fast.ops.chunked_vocabulary import plain
from repdeg_fast.ops.products import LibraryProducts

if TYPE_CHECKING:
    from triton_kernels import linear_cross_entropy as streaming
    from triton_kernels import linear_cross_entropy_heads as heads_
    from triton_kernels import linear_cross_entropy_rows as rows_
else:
    from repdeg_fast.triton_kernels import linear_cross_entropy as streaming
    from repdeg_fast.triton_kernels import linear_cross_entropy_heads as heads_
    from repdeg_fast.triton_kernels import linear_cross_entropy_rows as rows_


class RowKernels(LibraryProducts):
    wide_logits = True  # as the forward kernel has them

    def rows(self, block: LogitBlock, columns: Columns, rule: LossRule, *, accumulate_bias: bool) -> None:
        rows_.rows(block, columns, rule, accumulate_bias)

    def share(self, head: Head, rule: LossRule, mean: bool) -> Tensor:
        return heads_.share(head, rule, mean)

    def total(self, losses: Tensor, heads: int, share: Tensor) -> Tensor:
        return heads_.total(losses, heads, share)


class Kernels(ChunkedLogits):
    def __init__(self) -> None:
        super().__init__(RowKernels())

    def forward(
        self, head: Head, rule: LossRule, predicted: Tensor | None = None, look: Look | None = None
    ) -> tuple[Tensor, Tensor]:
        if look is None:
            return streaming.forward(_with_plain_bias(head), rule, predicted)
        n = head.hidden_states.shape[0]  # logits to look at are in memory: what passes over them makes gradients, too
        nothing = Upstream(head.hidden_states.new_zeros((), dtype=torch.float32).expand(n))
        loss, lse, _ = self.forward_backward(nothing, head, rule, NOTHING, look, predicted)
        return loss, lse

    def rescale_(
        self, gradients: Gradients, grad_heads: Tensor, rows: GradRows, head: Head, rule: LossRule, wanted: Wanted
    ) -> None:
        heads_.rescale_(gradients, grad_heads, rows, _with_plain_bias(head), rule)


def _with_plain_bias(head: Head) -> Head:
    return head._replace(bias=plain(head.bias))
