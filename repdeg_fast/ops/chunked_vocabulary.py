"""Gumbel mixing as the library's products around a backend's kernels, on a reused fp32 chunk of the vocabulary.

Forward: z = h̄ Eᵀ of a chunk for all rows, then a look at it: noise, running maximum, its token, Σ of exponentials.
Backward: the same z, and F·r beside it, turn in place to y and y (F·r − F[x̂]·r) in the dtype of the hidden states,
which one product adds to Σ y E and Σ y (F·r − F[x̂]·r) E for all rows. δ is known only when all chunks have passed, but
dh̄ is linear in it: four products, nothing swept twice.

A chunk need not stay in L2. The products and the noise take longer than moving fp32 logits to memory and back would;
larger chunks are fewer launches, and fuller waves of the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.contracts.gumbel_mix import (
    ChunkKernels,
    Drawn,
    Estimator,
    Gradients,
    HeadLogits,
    Heads,
    LogitChunk,
    Noise,
    Origin,
    Projection,
    RowState,
    Sums,
    Wanted,
)
from repdeg_fast.contracts.linear_cross_entropy import Columns
from repdeg_fast.ops.products import LibraryProducts, operand
from repdeg_fast.reference.gumbel_mix import embed_backward

BUFFER_BYTES = 64 << 20  # of logits; as much again for products F·r
multiply = LibraryProducts().multiply
_UNITS = (1024, 128)  # columns: what the kernels take a step, what fills a tile of a product


class _Sample(NamedTuple):
    """What a sweep over its y starts from."""

    mixed: Tensor  # h̄ (M, d)
    projection: Projection
    embedding: Tensor
    drawn: Drawn
    noise: Noise


class ChunkedVocabulary:
    """The operation's ``Kernels`` from a backend's ``ChunkKernels``."""

    def __init__(self, kernels: ChunkKernels) -> None:
        self.kernels = kernels

    def forward(
        self, heads: Heads, projection: Projection, embedding: Tensor, noise: Noise, *, hard: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, projection = self._mix(heads), with_plain_bias(projection)
        peak = mixed.new_empty(len(mixed), dtype=torch.float32)
        drawn = Drawn(torch.empty_like(peak, dtype=torch.int64), peak)
        state = _nothing_known(drawn)
        (logits,) = chunk_buffers(1, mixed, len(projection.weight))
        for part in _chunks(projection.weight, logits):
            z = logits[:, : part.stop - part.start]
            multiply(z, mixed, operand_rows(projection.weight, part, mixed).t(), False)
            self.kernels.look(state, _chunk(z, projection, part), None, noise)
        peak.reciprocal_()
        if hard:
            return self.kernels.embed(embedding, drawn), *drawn
        return self._soft_values(_Sample(mixed, projection, embedding, drawn, noise)), *drawn

    def room(self, dtype: torch.dtype, temperature: float | None) -> int:
        return 0

    def sample_logits(self, drawn: Drawn, block: HeadLogits, noise: Noise, candidates: Tensor | None = None) -> None:
        logits, mixture_logits, bias, first_row = block
        chunk = LogitChunk(logits, plain(bias), Columns(0, logits.shape[2]), first_row)
        self.kernels.look(_nothing_known(drawn), chunk, mixture_logits, noise)
        drawn.peak.reciprocal_()

    def embed(self, embedding: Tensor, drawn: Drawn) -> Tensor:
        return self.kernels.embed(embedding, drawn)

    def backward(
        self, grad_values: Tensor, heads: Heads, projection: Projection, embedding: Tensor, drawn: Drawn, noise: Noise,
        estimator: Estimator, wanted: Wanted, candidates: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        hard, scale = estimator
        grad_embedding = embed_backward(grad_values, embedding, drawn) if wanted.embedding and hard else None
        if not wanted.mixture_logits and (hard or not wanted.embedding):
            return Gradients(None, grad_embedding)
        sample = _Sample(self._mix(heads), with_plain_bias(projection), embedding, drawn, noise)
        grad_soft = torch.empty_like(embedding) if wanted.embedding and not hard else None
        origin = self._origin(sample, grad_values if wanted.mixture_logits else None)
        sums = _sums(origin)
        products = drawn.peak.new_empty(2 if wanted.mixture_logits else 0, *sample.mixed.shape)
        for part, weights in self._weights(sample, origin, sums):
            if wanted.mixture_logits:
                weight, both = operand_rows(projection.weight, part, sample.mixed), weights.flatten(0, 1)
                multiply(products.flatten(0, 1), both, weight, part.start > 0)
            if grad_soft is not None:
                grad_soft[part] = _product(weights[0].t(), grad_values.to(weights.dtype))
        grad_mixture = None
        if origin.norms is not None:
            plain, weighted = products
            factor = scale / noise.temperature
            grad_mixture = self.kernels.mixture_gradient((plain, weighted), sums, origin.norms, heads, factor)
        return Gradients(grad_mixture, grad_embedding if grad_soft is None else grad_soft)

    def _mix(self, heads: Heads) -> Tensor:
        return operand(self.kernels.mix(heads), heads.hidden_states.dtype)

    def _soft_values(self, sample: _Sample) -> Tensor:
        origin = self._origin(sample, None)
        sums, peak, embedding = _sums(origin), sample.drawn.peak, sample.embedding
        values = peak.new_empty(len(peak), embedding.shape[1])
        for part, weights in self._weights(sample, origin, sums):
            multiply(values, weights[0], operand_rows(embedding, part, sample.mixed), part.start > 0)
        values /= sums.total[:, None]  # 1, but for tokens that count as equal to the drawn one
        return values.to(embedding.dtype).masked_fill_(~peak.isfinite()[:, None], float("nan"))

    def _origin(self, sample: _Sample, grad_values: Tensor | None) -> Origin:
        mixed, projection, embedding, drawn, noise = sample
        row = lambda: torch.empty_like(drawn.peak)  # noqa: E731
        origin = Origin(row(), None, None, None)
        if grad_values is not None:
            origin = Origin(row(), row(), row(), mixed.new_empty(grad_values.shape))
        self.kernels.origins(origin, grad_values, mixed, projection, embedding, drawn.token_ids, noise)
        return origin

    def _weights(self, sample: _Sample, origin: Origin, sums: Sums) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of the vocabulary and their y (1, M, W); where there is an upstream gradient y and y (F·r − F[x̂]·r)
        (2, M, W). In memory that is used again."""
        mixed, projection, embedding, drawn, noise = sample
        buffers = chunk_buffers(1 if origin.unit is None else 2, mixed, len(projection.weight))
        for part in _chunks(projection.weight, buffers[0]):
            wide, narrow = (b[:, :, : part.stop - part.start] for b in (buffers, buffers.view(mixed.dtype)))
            multiply(wide[0], mixed, operand_rows(projection.weight, part, mixed).t(), False)
            weighted = products = None
            if origin.unit is not None:
                weighted, products = narrow[1], wide[1]
                multiply(products, origin.unit, operand_rows(embedding, part, mixed).t(), False)
            chunk = _chunk(wide[0], projection, part)
            self.kernels.weights(narrow[0], weighted, sums, chunk, products, origin, drawn, noise)
            yield part, narrow


def _sums(origin: Origin) -> Sums:
    zeros = torch.zeros_like(origin.perturbed)
    return Sums(zeros, None if origin.unit is None else torch.zeros_like(zeros))


def _nothing_known(drawn: Drawn) -> RowState:
    """A state whose memory is that of the sample which it becomes, but for 1/y."""
    token_ids, peak = drawn
    return RowState(torch.full_like(peak, -torch.inf), token_ids.zero_(), peak.zero_())


def chunk_buffers(count: int, mixed: Tensor, vocabulary: int) -> Tensor:
    """(count, M, W) in fp32, W the columns of a chunk: a multiple of what makes whole steps. Of doubles in float64."""
    rows, most = max(1, len(mixed)), -(-vocabulary // 16) * 16
    columns = BUFFER_BYTES // (4 * rows)
    columns = next((columns // unit * unit for unit in _UNITS if columns >= unit), _UNITS[-1])
    return mixed.new_empty(count, len(mixed), min(columns, most), dtype=arithmetic_dtype(mixed))


def _chunks(weight: Tensor, logits: Tensor) -> Iterator[slice]:
    """Columns of the vocabulary that ``logits`` has room for."""
    size, step = len(weight), logits.shape[1]
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


def _chunk(logits: Tensor, projection: Projection, part: slice) -> LogitChunk:
    return LogitChunk(logits[None], projection.bias, Columns(part.start, len(projection.weight)), 0)


def operand_rows(matrix: Tensor, part: slice, like: Tensor) -> Tensor:
    """Some rows, in the dtype that gets multiplied."""
    return operand(matrix[part], like.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    multiply(out, a, b, False)
    return out


def with_plain_bias(projection: Projection) -> Projection:
    return projection._replace(bias=plain(projection.bias))


def plain(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None else bias.contiguous()
