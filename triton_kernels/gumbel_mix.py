"""Gumbel mixing in Triton: what is done with a chunk of logits. Mathematics: ``repdeg_fast/reference/gumbel_mix.py``.

The products are the library's (``repdeg_fast/ops/chunked_vocabulary.py``). Here a program takes a row: it reads its
fp32 logits once, makes the noise from a counter in registers (some 70 instructions a logit: these kernels are bound by
arithmetic, not by bandwidth) and keeps maximum, token and sum of exponentials, or writes y over the logits. A program
owns its row and chunks come in order: no atomics, the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import gumbel, gumbel_at
from .tile import origin
from .tuning import choose, padded_columns

if TYPE_CHECKING:
    from repdeg_fast.contracts.gumbel_mix import Drawn, Heads, LogitChunk, Noise, Origin, Projection, RowState, Sums

_BLOCK, _DOT_BLOCK = 1024, 512  # values of a hidden state or an embedding a step


@dataclass(frozen=True)
class Block:
    """``columns`` logits of a row a step."""

    columns: int
    num_warps: int


# The one that ships first. 8 a thread: noise takes about four registers each while it is made.
BLOCKS = (Block(1024, 4), Block(1024, 2))


# α of a row: the largest mixture logit and 1/Σ exp(logit − largest). NaN anywhere makes all of them NaN.
@triton.jit
def _softmax(logits, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr):
    head = tl.arange(0, PADDED_HEADS)
    all_logits = tl.load(logits + head * head_stride, mask=head < HEADS, other=float("-inf")).to(tl.float32)
    most = tl.max(all_logits, axis=0)
    return most, 1 / tl.sum(tl.where(head < HEADS, tl.exp(all_logits - most), 0.0), axis=0)


# h̄ = Σ α_k h^(k), summed in fp32.
@triton.jit
def _mix_kernel(
    mixed, hidden_states, mixture_logits, depth,
    hidden_head_stride, hidden_stride, hidden_depth_stride, mixture_stride, mixture_head_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    hidden_states += row * hidden_stride
    mixture_logits += row * mixture_stride
    most, inverse = _softmax(mixture_logits, mixture_head_stride, HEADS, PADDED_HEADS)
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)
        total = tl.zeros((BLOCK,), tl.float32)
        head = hidden_states
        for h in tl.static_range(HEADS):
            alpha = tl.exp(tl.load(mixture_logits + h * mixture_head_stride).to(tl.float32) - most) * inverse
            total += alpha * tl.load(head + k * hidden_depth_stride, mask=k < depth, other=0.0).to(tl.float32)
            head += hidden_head_stride  # step by step: h·stride may need 64 bits
        tl.store(mixed + row * depth + k, total.to(mixed.dtype.element_ty), mask=k < depth)


# What is known of a row, after some logits more: the largest z + g so far, its token, Σ exp((z + g − largest)/τ). The
# logits are those of K heads, mixed here, or of their mixture.
@triton.jit
def _look_kernel(
    most_out, token_ids, total_out, logits, mixture_logits, bias, seed, inverse_temperature,
    width, padded_width, first_column, first_row, head_stride, row_stride, mixture_stride, mixture_head_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = row + tl.zeros((1,), tl.int32)
    logits += row.to(tl.int64) * row_stride
    key = tl.load(seed)
    if mixture_logits is not None:
        mixture_logits += row.to(tl.int64) * mixture_stride
        share_most, share_inverse = _softmax(mixture_logits, mixture_head_stride, HEADS, PADDED_HEADS)
    most, token, total = tl.load(most_out + at), tl.load(token_ids + at), tl.load(total_out + at)
    for begin in tl.range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        s = tl.reshape(gumbel(key, first_row + at, first_column + begin, COLUMNS), (COLUMNS,))
        if bias is not None:
            s += tl.load(bias + first_column + columns, mask=columns < width, other=0.0).to(tl.float32)
        head = logits
        for h in tl.static_range(HEADS):
            z = tl.load(head + columns, mask=columns < padded_width, other=0.0).to(tl.float32)
            if mixture_logits is not None:
                share = tl.load(mixture_logits + h * mixture_head_stride).to(tl.float32)
                z *= tl.exp(share - share_most) * share_inverse
            s += z
            head += head_stride
        s = tl.where(columns < width, s, float("-inf"))[None, :]
        # a NaN is nobody's maximum, but stays in the sum
        here, index = tl.max(tl.where(s == s, s, float("-inf")), axis=1, return_indices=True)
        token = tl.where(here > most, (first_column + begin + index).to(tl.int64), token)
        new = tl.maximum(most, here)
        zero = origin(new)
        total *= tl.exp((most - zero) * inverse_temperature)
        total += tl.sum(tl.exp((s - zero[:, None]) * inverse_temperature), axis=1)
        most = new
    tl.store(most_out + at, most)
    tl.store(token_ids + at, token)
    tl.store(total_out + at, total)


# F[x̂] of a row; NaN where nothing could be drawn.
@triton.jit
def _embed_kernel(values, embedding, token_ids, peak, depth, stride, depth_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    embedding += tl.load(token_ids + row) * stride
    y = tl.load(peak + row)
    drawn = tl.abs(y) < float("inf")
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)
        value = tl.load(embedding + k * depth_stride, mask=k < depth, other=0.0)
        value = tl.where(drawn, value, float("nan")).to(values.dtype.element_ty)
        tl.store(values + row * depth + k, value, mask=k < depth)


# a·b, b rounded to the dtype of a.
@triton.jit
def _dot(a, b, depth, a_stride, b_stride, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(a + k * a_stride, mask=k < depth, other=0.0)
        w = tl.load(b + k * b_stride, mask=k < depth, other=0.0)
        total += x.to(tl.float32) * w.to(x.dtype).to(tl.float32)
    return tl.sum(total, axis=0)


# What a row's y and y F·r count from: z + g of the drawn token and, where there is an upstream gradient, F[x̂]·r. r is
# brought to length 1 first: neither do large gradients overflow in fp16, nor do small ones vanish.
@triton.jit
def _origins_kernel(
    perturbed, products, norms, unit, mixed, weight, bias, embedding, grad, token_ids, seed, depth, embedding_depth,
    mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride,
    embedding_stride, embedding_depth_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    at = tl.zeros((1,), tl.int64)
    s = gumbel_at(tl.load(seed), row + at, token + at)
    s += _dot(
        mixed + row * mixed_stride, weight + token * weight_stride, depth, mixed_depth_stride, weight_depth_stride,
        BLOCK,
    )  # fmt: skip
    if bias is not None:
        s += tl.load(bias + token).to(tl.float32)
    tl.store(perturbed + row + at, s)
    if grad is not None:
        grad += row * embedding_depth
        unit += row * embedding_depth
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, embedding_depth, BLOCK):
            k = first + tl.arange(0, BLOCK)
            r = tl.load(grad + k, mask=k < embedding_depth, other=0.0).to(tl.float32)
            squares += r * r
        norm = tl.sqrt(tl.sum(squares, axis=0))
        inverse = tl.where(norm == 0, 0.0, 1 / norm)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, embedding_depth, BLOCK):
            k = (first + tl.arange(0, BLOCK)).to(tl.int64)
            inside = k < embedding_depth
            r = (tl.load(grad + k, mask=inside, other=0.0).to(tl.float32) * inverse).to(unit.dtype.element_ty)
            tl.store(unit + k, r, mask=inside)
            f = tl.load(
                embedding + token * embedding_stride + k * embedding_depth_stride, mask=inside, other=0.0
            )  # fmt: skip
            total += r.to(tl.float32) * f.to(r.dtype).to(tl.float32)
        tl.store(norms + row, norm)
        tl.store(products + row, tl.sum(total, axis=0))


# A row of logits to y and, where `weighted` is given, of products F·r to y (F·r − product), each over its own memory
# in the dtype that gets multiplied; and their sums over the row so far, of the values as they are stored: what is taken
# off a sum of rounded numbers must be made of the same ones.
# y = peak · exp((z + g − origin)/τ), where origin is z + g of the drawn token and peak its y, the largest. Where a
# product rounds otherwise than the sweep that drew, another token may come out above it, at a small τ far above: it
# counts as equal.
@triton.jit
def _weights_kernel(
    y_out, weighted, total, delta, logits, products_out, bias, perturbed, products, token_ids, peak, seed,
    inverse_temperature, width, padded_width, first_column, row_stride, out_stride, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = row + tl.zeros((1,), tl.int32)
    logits += row.to(tl.int64) * row_stride
    y_out += row.to(tl.int64) * out_stride
    key, token, zero, scale = tl.load(seed), tl.load(token_ids + row), tl.load(perturbed + row), tl.load(peak + row)
    sum_y = tl.zeros((COLUMNS,), tl.float32)
    if weighted is not None:
        products_out += row.to(tl.int64) * row_stride
        weighted += row.to(tl.int64) * out_stride
        product = tl.load(products + row)
        sum_weighted = tl.zeros((COLUMNS,), tl.float32)
    for begin in tl.range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        inside = columns < padded_width
        z = tl.load(logits + columns, mask=inside, other=0.0)
        if weighted is not None:
            fr = tl.load(products_out + columns, mask=inside, other=0.0)
        s = z + tl.reshape(gumbel(key, at, first_column + begin, COLUMNS), (COLUMNS,))
        if bias is not None:
            s += tl.load(bias + first_column + columns, mask=columns < width, other=0.0).to(tl.float32)
        exponent = (s - zero) * inverse_temperature
        exponent = tl.where((exponent > 0) | (first_column + columns == token), 0.0, exponent)
        y = tl.where(columns < width, tl.exp(exponent) * scale, 0.0).to(y_out.dtype.element_ty)
        tl.debug_barrier()  # values of 16 bits go where other threads' logits of this step were
        tl.store(y_out + columns, y, mask=inside)  # the padding too
        sum_y += y.to(tl.float32)
        if weighted is not None:
            w = tl.where(columns < width, y.to(tl.float32) * (fr - product), 0.0).to(weighted.dtype.element_ty)
            tl.store(weighted + columns, w, mask=inside)
            sum_weighted += w.to(tl.float32)
    tl.store(total + at, tl.load(total + at) + tl.sum(sum_y, axis=0))
    if weighted is not None:
        tl.store(delta + at, tl.load(delta + at) + tl.sum(sum_weighted, axis=0))


# The gradient of a row's mixture logits, from Σ y E, Σ y (F·r − product) E, Σ y and δ: dh̄·h^(k), then softmax backward.
# y adds up to 1 but for its rounding, and where it was drawn from other logits.
@triton.jit
def _mixture_gradient_kernel(
    grad_mixture, plain, weighted, total, delta, norms, hidden_states, mixture_logits, scale, depth,
    hidden_head_stride, hidden_stride, hidden_depth_stride, mixture_stride, mixture_head_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    share = 1 / tl.load(total + row)
    mean = tl.load(delta + row) * share
    factor = share * tl.load(norms + row) * scale
    plain += row * depth
    weighted += row * depth
    hidden_states += row * hidden_stride
    mixture_logits += row * mixture_stride
    heads = tl.arange(0, PADDED_HEADS)
    grad_alpha = tl.zeros((PADDED_HEADS,), tl.float32)
    for h in tl.static_range(HEADS):
        products = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, depth, BLOCK):
            k = (first + tl.arange(0, BLOCK)).to(tl.int64)
            inside = k < depth
            grad_mixed = tl.load(weighted + k, mask=inside, other=0.0) - mean * tl.load(
                plain + k, mask=inside, other=0.0
            )
            hidden = tl.load(hidden_states + k * hidden_depth_stride, mask=inside, other=0.0)
            products += grad_mixed * factor * hidden.to(tl.float32)
        grad_alpha = tl.where(heads == h, tl.sum(products, axis=0), grad_alpha)
        hidden_states += hidden_head_stride
    most, inverse = _softmax(mixture_logits, mixture_head_stride, HEADS, PADDED_HEADS)
    logits = tl.load(mixture_logits + heads * mixture_head_stride, mask=heads < HEADS, other=float("-inf"))
    alpha = tl.where(heads < HEADS, tl.exp(logits.to(tl.float32) - most) * inverse, 0.0)
    grad = alpha * (grad_alpha - tl.sum(alpha * grad_alpha, axis=0))
    tl.store(grad_mixture + row * HEADS + heads, grad.to(grad_mixture.dtype.element_ty), mask=heads < HEADS)


def mix(heads: Heads) -> Tensor:
    """h̄ (M, d) in the dtype of the hidden states."""
    hidden_states, mixture_logits = heads
    if mixture_logits is None:
        return hidden_states[0]
    k, m, d = hidden_states.shape
    mixed = hidden_states.new_empty(m, d)
    if m > 0:
        _mix_kernel[(m,)](
            mixed, hidden_states, mixture_logits, d, *hidden_states.stride(), *mixture_logits.stride(),
            HEADS=k, PADDED_HEADS=triton.next_power_of_2(k), BLOCK=_BLOCK,
        )  # fmt: skip
    return mixed


def look(state: RowState, chunk: LogitChunk, mixture_logits: Tensor | None, noise: Noise) -> None:
    """Take in a chunk of the vocabulary."""
    logits, bias, (first_column, _), first_row = chunk
    heads, m, width = logits.shape
    if m == 0:
        return
    strides = (0, 0) if mixture_logits is None else mixture_logits.stride()
    block = choose("gumbel_mix.look", BLOCKS, logits, v=width)
    _look_kernel[(m,)](
        state.most, state.token_ids, state.total, logits, mixture_logits, bias, noise.seed, _inverse(noise),
        width, padded_columns(logits), first_column, first_row, *logits.stride()[:2], *strides,
        HEADS=heads, PADDED_HEADS=triton.next_power_of_2(heads), COLUMNS=block.columns, num_warps=block.num_warps,
    )  # fmt: skip


def embed(embedding: Tensor, drawn: Drawn) -> Tensor:
    """F[x̂] (M, d_f)."""
    m, d = len(drawn.token_ids), embedding.shape[1]
    values = embedding.new_empty(m, d)
    if m > 0:
        _embed_kernel[(m,)](values, embedding, *drawn, d, *embedding.stride(), BLOCK=_BLOCK)
    return values


def origins(
    origin: Origin, grad_values: Tensor | None, mixed: Tensor, projection: Projection, embedding: Tensor,
    token_ids: Tensor, noise: Noise,
) -> None:  # fmt: skip
    """Write what a row's y and y F·r count from."""
    if len(mixed) == 0:
        return
    weight, bias = projection
    _origins_kernel[(len(mixed),)](
        *origin, mixed, weight, bias, embedding, grad_values, token_ids, noise.seed, mixed.shape[1],
        embedding.shape[1], *mixed.stride(), *weight.stride(), *embedding.stride(), BLOCK=_DOT_BLOCK,
    )  # fmt: skip


def weights(
    y: Tensor, weighted: Tensor | None, sums: Sums, chunk: LogitChunk, products: Tensor | None, origin: Origin,
    drawn: Drawn, noise: Noise,
) -> None:  # fmt: skip
    """y (M, W) of a chunk and, with products F·r (M, W), y (F·r − F[x̂]·r); both may lie over what they are made of, in
    rows that begin at the same place. Their sums are added to ``sums``."""
    logits, bias, (first_column, _), _ = chunk
    _, m, width = logits.shape
    if m == 0:
        return
    block = choose("gumbel_mix.weights", BLOCKS, y, v=width)
    _weights_kernel[(m,)](
        y, weighted, *sums, logits, products, bias, origin.perturbed, origin.products, *drawn, noise.seed,
        _inverse(noise), width, padded_columns(logits), first_column, logits.stride(1), y.stride(0),
        COLUMNS=block.columns, num_warps=block.num_warps,
    )  # fmt: skip


def mixture_gradient(
    weighted_sums: tuple[Tensor, Tensor], sums: Sums, norms: Tensor, heads: Heads, scale: float
) -> Tensor:
    """(M, K) in the dtype of the mixture logits, from Σ y E and Σ y (F·r − F[x̂]·r) E."""
    hidden_states, mixture_logits = heads
    assert mixture_logits is not None
    (k, m, d), grad = hidden_states.shape, torch.empty_like(mixture_logits, memory_format=torch.contiguous_format)
    if m > 0:
        _mixture_gradient_kernel[(m,)](
            grad, *weighted_sums, *sums, norms, hidden_states, mixture_logits, scale, d,
            *hidden_states.stride(), *mixture_logits.stride(),
            HEADS=k, PADDED_HEADS=triton.next_power_of_2(k), BLOCK=_BLOCK,
        )  # fmt: skip
    return grad


def _inverse(noise: Noise) -> float:
    """1/τ as fp32 has it: ∞ · 0 would be NaN."""
    return min(1 / noise.temperature, torch.finfo(torch.float32).max)
