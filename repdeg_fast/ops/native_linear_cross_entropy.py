"""The C++ kernels of the linear cross entropy in the form of its contract: a row kernel around what the library
multiplies, and all in one call for small problems."""

from __future__ import annotations

from repdeg_fast.contracts.linear_cross_entropy import Head, Losses, LossRule, Wanted
from repdeg_fast.native import Namespace, products
from repdeg_fast.native.linear_cross_entropy import RowKernels
from repdeg_fast.ops.chunked_logits import WIDE, ChunkedLogits

SMALL = 1 << 20  # multiplications a product: 20 µs or less


class Kernels(ChunkedLogits):
    def __init__(self, operators: Namespace) -> None:
        super().__init__(RowKernels(operators))
        self._small = operators.linear_cross_entropy_small.default

    def at_once(self, head: Head, rule: LossRule, heads: int, mean: bool, wanted: Wanted) -> Losses | None:
        hidden_states, weight, _, bias = head
        dtype = hidden_states.dtype
        if hidden_states.numel() * weight.shape[0] > SMALL or dtype not in WIDE or weight.dtype != dtype:
            return None
        if products.batch_invariant():
            return None
        if 1 not in hidden_states.stride() or 1 not in weight.stride():
            return None
        if bias is not None and not (bias.dtype == dtype and bias.is_contiguous()):
            return None
        try:
            return Losses(*self._small(*head, heads, *rule[:3], mean, *wanted[:3]))
        except RuntimeError:
            self.share(head, rule, mean)  # says what is wrong with a target, where that is what it was
            raise
