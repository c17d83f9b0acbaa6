"""The contract of the linear cross entropy. Mathematics: :mod:`repdeg_fast.reference.linear_cross_entropy`.

Two levels. An operator calls :class:`Kernels`. A backend has those whole, or it has :class:`RowKernels`, which know one
block of logits at a time, and gets the rest from :mod:`repdeg_fast.ops.chunked_logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Head(NamedTuple):
    """N = K·M rows that are scored against a vocabulary: K heads of M positions, head by head."""

    hidden_states: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    target: Tensor  # (M,): row r has target[r mod M]
    bias: Tensor | None  # (V,)


class ClassWeight(NamedTuple):
    each: Tensor  # (V,), contiguous, in the arithmetic dtype
    total: Tensor  # (): their sum


class LossRule(NamedTuple):
    ignore_index: int
    label_smoothing: float
    softcap: float  # 0: none
    class_weight: ClassWeight | None = None
    gradient_filter: float = 0.0  # what is less probable, and not the target, gets no gradient


class Wanted(NamedTuple):
    """Which gradients to make, and in what that of the weight is summed over parts."""

    hidden_states: bool
    weight: bool
    bias: bool
    accumulate_dtype: torch.dtype

    @classmethod
    def of(cls, needs: list[bool], accumulate_dtype: torch.dtype) -> Wanted:
        hidden_states, weight, bias = needs
        return cls(hidden_states, weight, bias, accumulate_dtype)


class Upstream(NamedTuple):
    """What comes from above, a row each: of ℓ, of the log-sum-exp, and of its square in rows that count (a z-loss).
    The first and the last may be one value, expanded."""

    grad_loss: Tensor  # (N,)
    grad_lse: Tensor | None = None  # (N,), contiguous
    grad_lse_square: Tensor | None = None  # (N,)

    def at(self, lse: Tensor, target: Tensor, ignore_index: int) -> Upstream:
        """The same without the square, whose gradient is 2·grad_lse_square·lse where the log-sum-exp is known."""
        if self.grad_lse_square is None:
            return self
        counts = (target != ignore_index).repeat(lse.shape[0] // max(target.shape[0], 1))
        of_square = (2 * self.grad_lse_square * lse).where(counts, 0)
        return Upstream(self.grad_loss, of_square if self.grad_lse is None else self.grad_lse + of_square)


class Gradients(NamedTuple):
    """Each in the dtype of what it belongs to; ``None``: not wanted."""

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Losses(NamedTuple):
    """Gradients of Σ loss that were not made are empty."""

    loss: Tensor  # (K,), or (K, M) without reduction
    lse: Tensor  # (N,)
    grad_hidden_states: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


# What `grad_heads` means for the rows, made when it is asked for.
GradRows = Callable[[], Upstream]

# Shown the logits (K, m, V) of positions [first, first + m), without the bias, before they turn to gradients.
Look = Callable[[Tensor, int], None]


class Kernels(Protocol):
    def at_once(self, head: Head, rule: LossRule, heads: int, mean: bool, wanted: Wanted) -> Losses | None:
        """All that follows, up to the losses and the gradients of their sum, in one call: where a backend has one, for
        problems so small that calls cost more than products, and nothing but label smoothing and a softcap. ``None``:
        step by step."""

    def share(self, head: Head, rule: LossRule, mean: bool) -> Tensor:
        """What the ℓ of each row that counts adds to its head's loss: (), 1, or for a ``mean`` 1 over the number of
        targets that count, or over the sum of their classes' weights (1 where that is 0). A target outside the
        vocabulary is an error where looking costs no wait: on a CPU."""

    def total(self, losses: Tensor, heads: int, share: Tensor) -> Tensor:
        """(K,): the sum of each head's rows, times their share."""

    def forward(
        self, head: Head, rule: LossRule, predicted: Tensor | None = None, look: Look | None = None
    ) -> tuple[Tensor, Tensor]:
        """ℓ and the log-sum-exp of every row, (N,) each. A target outside the vocabulary makes its rows' ℓ NaN.
        ``predicted`` (N,), int64, is written: the first of the classes with the largest logit."""

    def forward_backward(
        self, upstream: Upstream, head: Head, rule: LossRule, wanted: Wanted, look: Look | None = None,
        predicted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
        """As ``forward``, and the gradients of Σ grad_loss·ℓ + Σ grad_lse·lse + Σ grad_lse_square·lse² in one sweep,
        where these are known beforehand."""

    def backward(
        self, upstream: Upstream, head: Head, lse: Tensor, rule: LossRule, wanted: Wanted,
        columns: Columns | None = None,
    ) -> Gradients:  # fmt: skip
        """The gradients of Σ grad_loss·ℓ + Σ grad_lse·lse from the saved log-sum-exp, without a square: what that
        means is known by then (:meth:`Upstream.at`). ``columns``: weight and bias are those of a part of the
        vocabulary, whose targets, log-sum-exp and class weights are of the whole."""

    def rescale_(
        self, gradients: Gradients, grad_heads: Tensor, rows: GradRows, head: Head, rule: LossRule, wanted: Wanted
    ) -> None:
        """Turn the gradients of Σ_k loss_k into those of Σ_k grad_heads_k·loss_k, in place. One scale serves if all K
        are the same; else those that are sums over heads are made again."""


class Columns(NamedTuple):
    """Which part of a vocabulary a block of logits covers: a tile today, a shard on one of several devices as well."""

    first: int
    vocabulary: int  # the size of the whole


class LogitBlock(NamedTuple):
    """Logits h Eᵀ and what belongs to their R rows and W columns."""

    logits: Tensor  # (R, W), turned to their gradient in place where no other is given
    lse: Tensor  # (R,), written with ``loss``, else read
    loss: Tensor | None  # (R,), written; then the block covers the whole vocabulary
    grad_bias: Tensor | None  # (W,), written or added to
    target: Tensor  # (M,)
    first_row: int  # row r has target[(first_row + r) mod M]
    bias: Tensor | None  # (W,), contiguous, in the arithmetic dtype
    grad_loss: Tensor | None  # (R,); None: no gradient is wanted, and logits are left as they come
    grad_lse: Tensor | None  # (R,)
    gradient: Tensor | None = None  # (R, W), in another dtype: where the gradient goes, not in place
    grad_lse_square: Tensor | None = None  # (R,), where the log-sum-exp is written
    predicted: Tensor | None = None  # (R,), int64, written with ``loss``


class Products(Protocol):
    """A backend's way with the products around a row kernel."""

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        """out = a @ b, or out += a @ b. Where ``wide_logits``, ``out`` may be wider than the operands."""

    def add(self, total: Tensor, product: Tensor) -> None:
        """total += product, where their dtypes differ."""

    def advise(self, fresh: Tensor) -> None:
        """A hint about memory that will be kept and used again."""


class RowKernels(Products, Protocol):
    """The row kernel of a backend, and what it needs before and after."""

    # Whether logits that meet a known log-sum-exp are made in the arithmetic dtype, since it was made of such: where a
    # 16-bit logit of 1,000 is rounded by 2, the exponential of their difference means nothing.
    wide_logits: bool

    def rows(self, block: LogitBlock, columns: Columns, rule: LossRule, *, accumulate_bias: bool) -> None:
        """See :class:`LogitBlock`."""

    def share(self, head: Head, rule: LossRule, mean: bool) -> Tensor:
        """See :class:`Kernels`."""

    def total(self, losses: Tensor, heads: int, share: Tensor) -> Tensor:
        """See :class:`Kernels`."""
