"""The contract of Gumbel mixing. Mathematics: :mod:`repdeg_fast.reference.gumbel_mix`.

Two levels. An operator calls :class:`Kernels`. A backend has those whole, or it has :class:`ChunkKernels`, which know
one chunk of the vocabulary at a time, and gets the rest from :mod:`repdeg_fast.ops.chunked_vocabulary`.

Tensors may have any strides, and dtypes of their own; the *arithmetic dtype* is fp32, or float64 where all are.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Columns


class Heads(NamedTuple):
    """What is mixed, h̄ = Σ_k α_k h^(k)."""

    hidden_states: Tensor  # (K, M, d)
    mixture_logits: Tensor | None  # (M, K); None: K is 1


class Projection(NamedTuple):
    """z = E h̄ + b."""

    weight: Tensor  # (V, d), multiplied in the dtype of the hidden states
    bias: Tensor | None  # (V,)


class Noise(NamedTuple):
    """g of each (position, token), whoever makes it, and what (z + g) is divided by for y."""

    seed: Tensor  # one int64
    temperature: float
    first_row: int = 0  # number of the first position in a larger batch, of which these are some


class Drawn(NamedTuple):
    """A sample: all that is kept of it."""

    token_ids: Tensor  # x̂ (M,), int64
    peak: Tensor  # y_x̂ (M,), the largest y of the row, in the arithmetic dtype; not finite: nothing could be drawn


class Estimator(NamedTuple):
    """Which value a sample has, and what the mixture's gradient is multiplied by."""

    hard: bool
    gradient_scale: float


class Wanted(NamedTuple):
    """Which gradients to make."""

    mixture_logits: bool
    embedding: bool


class Gradients(NamedTuple):
    """Each in the dtype of what it belongs to; ``None``: not wanted."""

    mixture_logits: Tensor | None
    embedding: Tensor | None


class HeadLogits(NamedTuple):
    """Logits h^(k) Eᵀ of some positions over the whole vocabulary, where something else has made them."""

    logits: Tensor  # (K, m, V), rows of unit stride; without the bias
    mixture_logits: Tensor | None  # (m, K)
    bias: Tensor | None  # (V,)
    first_row: int  # the first position, which says what noise it gets


class Kernels(Protocol):
    def forward(
        self, heads: Heads, projection: Projection, embedding: Tensor, noise: Noise, *, hard: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The values (M, d_f) in the dtype of ``embedding``, NaN where y_x̂ is not finite; and the fields of
        :class:`Drawn`."""

    def room(self, dtype: torch.dtype, temperature: float | None) -> int:
        """How many values ``sample_logits`` keeps of a row of logits for ``backward``; 0: none. ``None``: the most that
        it does at any temperature."""

    def sample_logits(self, drawn: Drawn, block: HeadLogits, noise: Noise, candidates: Tensor | None = None) -> None:
        """Write the sample of these positions and, where there is room, the ``candidates`` (m, room), int32: which
        tokens matter for the gradient."""

    def embed(self, embedding: Tensor, drawn: Drawn) -> Tensor:
        """The hard values of a sample."""

    def backward(
        self, grad_values: Tensor, heads: Heads, projection: Projection, embedding: Tensor, drawn: Drawn, noise: Noise,
        estimator: Estimator, wanted: Wanted, candidates: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        """``grad_values`` (M, d_f): contiguous. ``peak`` need only be near: see the reference. With ``candidates`` of a
        hard sample, no other token needs to be looked at."""


class RowState(NamedTuple):
    """What is known of rows after some of the vocabulary, (M,) each: −∞, any token and 0 after none. Parts are put
    together by it: chunks of a vocabulary one after the other, or the shards of several devices."""

    most: Tensor  # the largest z + g, fp32
    token_ids: Tensor  # its token in the whole vocabulary
    total: Tensor  # Σ exp((z + g − most)/τ), fp32; after all of the vocabulary 1/y_x̂


class LogitChunk(NamedTuple):
    """Logits of some columns of the vocabulary, whose noise is that of the columns' place in the whole."""

    logits: Tensor  # (K, M, W), without the bias, rows of unit stride: of K heads, or of their mixture (K is 1)
    bias: Tensor | None  # (V,), contiguous, of the whole vocabulary
    columns: Columns
    first_row: int


class Origin(NamedTuple):
    """What y and y F·r of rows count from, and r as it is multiplied; all but the first where there is an upstream
    gradient."""

    perturbed: Tensor  # z + g of the drawn token (M,)
    products: Tensor | None  # F[x̂]·r/‖r‖ (M,)
    norms: Tensor | None  # ‖r‖ (M,)
    unit: Tensor | None  # r/‖r‖ (M, d_f), in the dtype of the hidden states


class Sums(NamedTuple):
    """Over the vocabulary, so far; (M,) each in fp32."""

    total: Tensor  # Σ y, near 1
    delta: Tensor | None  # Σ y (F·r − F[x̂]·r), r of length 1


class ChunkKernels(Protocol):
    """What a backend does with a chunk of logits; tensors in fp32 where nothing else is said."""

    def mix(self, heads: Heads) -> Tensor:
        """h̄ (M, d) in the dtype of the hidden states."""

    def look(self, state: RowState, chunk: LogitChunk, mixture_logits: Tensor | None, noise: Noise) -> None:
        """Bring ``state`` up to a chunk more."""

    def embed(self, embedding: Tensor, drawn: Drawn) -> Tensor:
        """As in :class:`Kernels`."""

    def origins(
        self, origin: Origin, grad_values: Tensor | None, mixed: Tensor, projection: Projection, embedding: Tensor,
        token_ids: Tensor, noise: Noise,
    ) -> None:  # fmt: skip
        """Write ``origin``; ``grad_values`` contiguous."""

    def weights(
        self, y: Tensor, weighted: Tensor | None, sums: Sums, chunk: LogitChunk, products: Tensor | None,
        origin: Origin, drawn: Drawn, noise: Noise,
    ) -> None:  # fmt: skip
        """y (M, W) of a chunk and, from products F·r (M, W), y (F·r − F[x̂]·r); both may lie over what they are made
        of, in rows that begin at the same place. Their sums are added to ``sums``."""

    def mixture_gradient(
        self, weighted_sums: tuple[Tensor, Tensor], sums: Sums, norms: Tensor, heads: Heads, scale: float
    ) -> Tensor:
        """That of the mixture logits, times ``scale``, from Σ y E and Σ y (F·r − F[x̂]·r) E (M, d)."""
