"""A sample of K heads' logits, and its gradient, from the few tokens that weigh anything. Mathematics:
``repdeg_fast/reference/gumbel_mix.py``.

y falls like exp(−x/τ) where s = z + g lies x below the largest, and within x of it lie e^x − 1 tokens on average,
whatever the logits: at a small τ a few tens of a whole vocabulary. Drawing looks at all tokens with one rough logarithm
each in place of two accurate ones, which leaves some hundreds to look at again, with the noise that is defined; those
within reach of the largest are kept. The gradient is made of rows of E and F that are gathered for them, without a
product with the vocabulary. A row with more tokens than there is room for looks at all of them instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gumbel_mix import _inverse, add_logits, shares_of
from .philox import GUMBEL_STREAM, gumbel_at, words
from .tile import origin
from .tuning import padded_columns, persistent_programs

if TYPE_CHECKING:
    from repdeg_fast.contracts.gumbel_mix import Drawn, HeadLogits, Heads, Noise, Projection

KEPT = 512  # values a row: how many tokens, and these
_MOST_WITHIN_REACH = 32  # tokens on average, for which KEPT is too few once in e¹⁶ rows
_SCRATCH = 1024  # tokens of a row that are looked at again
_COLUMNS, _NUM_WARPS, _PROGRAMS = 1024, 4, 9  # a step: 8 logits of each head a thread
_AGAIN, _WORDS = 128, 256  # tokens, and words of 32 marks, a step of the second look
_TOKENS, _DEPTH = 8, 256  # a step of the gradient: rows of E and F, and columns of these
_INTERPRETED_TOKENS = 256  # in the interpreter, where an operation costs about the same for many
# −log t of a float's bits b and t = float · 2⁻²³: −log 2 (b · 2⁻²³ − 127 − 23)
_OCTAVE, _OCTAVES = tl.constexpr(-0.6931471805599453 / (1 << 23)), tl.constexpr(0.6931471805599453 * 150)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


def reach(dtype: torch.dtype, temperature: float) -> float | None:
    """How far below the largest s a token matters: what lies further away adds up to 2⁻¹² of the largest y on average
    (in fp32 2⁻²⁴), ε = exp(−(1/τ − 1) x) / (1/τ − 1). None where too many tokens do."""
    a = 1 / temperature - 1
    if a <= 0:
        return None
    x = max(1.0, (math.log(2) * (24 if dtype == torch.float32 else 12) - math.log(a)) / a)
    return x if math.exp(x) <= _MOST_WITHIN_REACH else None


# s of one row's tokens (1, N), as the sweep over all of them has it.
@triton.jit
def _perturbed_logits(key, noise_row, columns, there, logits, bias, shares, head_stride):
    noise = gumbel_at(key, noise_row[:, None] + tl.zeros_like(columns), columns)
    at_bias = None if bias is None else bias + columns
    return add_logits(noise, logits + columns, at_bias, there, there, shares, head_stride)


# Marks the tokens of a row that may be within reach of the largest s, 32 a word. With t = 1 − u, −log u is t at least
# and, up to t = 1/2, 2 log 2 · t at most. The bits of a float, read as an integer, are its logarithm but for 0.0861 of
# an octave. So z − log t, made of these, is never below s, and for such t at most 0.39 above it.
@triton.jit
def _mark(
    marks, key, noise_row, logits, bias, shares, width, padded_width, head_stride, reach, slack, COLUMNS: tl.constexpr
):  # fmt: skip
    least = -float("inf")  # that the largest s is
    bit = tl.full((1, 32), 1, tl.uint32) << tl.arange(0, 32).to(tl.uint32)[None, :]
    for begin in tl.range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)[None, :]
        word = ~words(key, noise_row, begin, GUMBEL_STREAM, COLUMNS)
        t = (word >> 9).to(tl.float32) + 0.5  # times 2²³
        octaves = t.to(tl.int32, bitcast=True).to(tl.float32) * _OCTAVE + _OCTAVES
        at_bias = None if bias is None else bias + columns
        at_most = add_logits(
            octaves, logits + columns, at_bias, columns < width, columns < padded_width, shares, head_stride
        )
        at_most = tl.where(columns < width, at_most, -float("inf"))
        certain = tl.max(tl.where(word < 0x80000000, at_most, -float("inf"))) - 0.4
        least = tl.where(certain > least, certain, least)
        # NaN is marked, −∞ is not
        bound = tl.maximum(least - (reach + slack * tl.abs(origin(least))), _LOWEST)
        marked = tl.where(at_most < bound, 0, 1).to(tl.uint32).reshape(COLUMNS // 32, 32)
        mask = tl.sum(marked * bit, axis=1).to(tl.int32, bitcast=True)
        tl.store(marks + begin // 32 + tl.arange(0, COLUMNS // 32), mask)


# Lists the tokens that are marked, of which there are as many as it returns; those beyond ROOM are not written.
@triton.jit
def _list(found, marks, number_of_words, ROOM: tl.constexpr, WORDS: tl.constexpr):
    count = 0
    for begin in range(0, number_of_words, WORDS):
        at = begin + tl.arange(0, WORDS)
        word = tl.load(marks + at, mask=at < number_of_words, other=0).to(tl.uint32, bitcast=True)
        ones = word - ((word >> 1) & 0x55555555)
        ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
        ones = ((((ones + (ones >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
        place = count + tl.cumsum(ones, axis=0) - ones
        for _ in range(0, tl.max(ones)):
            lowest = word & (~word + 1)
            index = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(found + place, at * 32 + index, mask=(word != 0) & (place < ROOM))
            place += 1
            word ^= lowest
        count += tl.sum(ones)
    return count


# Token and y of rows, and the tokens that matter for their gradient. A program takes rows in turn, each by itself.
@triton.jit
def _draw_kernel(
    token_ids, peak, candidates, scratch, logits, mixture_logits, bias, seed, inverse_temperature, reach, slack,
    m, width, padded_width, first_row, head_stride, row_stride, mixture_stride, mixture_head_stride, kept_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, AGAIN: tl.constexpr,
    ROOM: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    key = tl.load(seed)
    number_of_words = tl.cdiv(width, COLUMNS) * (COLUMNS // 32)
    found = scratch + tl.program_id(0).to(tl.int64) * (2 * ROOM + number_of_words)
    values, marks = found + ROOM, found + 2 * ROOM  # their s, bit by bit
    for row in range(tl.program_id(0), m, tl.num_programs(0)):
        rows = row + tl.arange(0, 1)
        shares = shares_of(mixture_logits, rows, m, mixture_stride, mixture_head_stride, HEADS, PADDED_HEADS)
        at, noise_row = logits + tl.cast(row, tl.int64) * row_stride, first_row + rows
        _mark(marks, key, noise_row, at, bias, shares, width, padded_width, head_stride, reach, slack, COLUMNS)
        tl.debug_barrier()  # other threads of the program have written them
        count = _list(found, marks, number_of_words, ROOM, WORDS)
        listed = tl.where(count > ROOM, 0, count)  # or all of them are looked at
        n = tl.where(count > ROOM, width, count)
        tl.debug_barrier()
        most = tl.full((1,), -float("inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        token = tl.zeros((1,), tl.int64)
        for first in range(0, n, AGAIN):
            i = first + tl.arange(0, AGAIN)[None, :]
            columns = tl.where(listed < n, i, tl.load(found + i, mask=i < listed, other=0))
            s = _perturbed_logits(key, noise_row, columns, i < n, at, bias, shares, head_stride)
            s = tl.where(i < n, s, -float("inf"))
            tl.store(values + i, s.to(tl.int32, bitcast=True), mask=i < listed)
            here, index = tl.max(tl.where(s == s, s, -float("inf")), axis=1, return_indices=True)
            best = tl.sum(tl.where(i == first + index[:, None], columns, 0), axis=1)
            token = tl.where(here > most, best.to(tl.int64), token)
            larger = tl.maximum(most, here)
            zero = origin(larger)
            total *= tl.exp((most - zero) * inverse_temperature)
            total += tl.sum(tl.exp((s - zero[:, None]) * inverse_temperature), axis=1)
            most = larger
        tl.store(token_ids + rows, token)
        tl.store(peak + rows, 1 / total)
        tl.debug_barrier()
        kept = candidates + tl.cast(row, tl.int64) * kept_stride
        bound = (most - (reach + slack * tl.abs(origin(most))))[:, None]
        filled = 0
        for first in range(0, listed, AGAIN):
            i = first + tl.arange(0, AGAIN)[None, :]
            s = tl.load(values + i, mask=i < listed, other=0).to(tl.float32, bitcast=True)
            columns = tl.load(found + i, mask=i < listed, other=0)
            keep = ((i < listed) & ~(s < bound)).to(tl.int32)
            place = filled + tl.cumsum(keep, axis=1)  # from 1: the number of them comes first
            tl.store(kept + place, columns, mask=(keep != 0) & (place < KEPT))
            filled += tl.sum(keep)
        tl.store(kept, tl.where((listed < n) | (filled >= KEPT), -1, filled))
        tl.debug_barrier()  # before the next row's are written


# Of tokens (T,): E[v]·h^(k), a head a column (T, PADDED_HEADS). The weight is rounded to what gets multiplied.
@triton.jit
def _head_logits(
    tokens, there, weight, hidden_states, depth, weight_stride, weight_depth_stride, head_stride, depth_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, PADDED_HEADS)[None, :]
    found = tl.zeros((tokens.shape[0], PADDED_HEADS), tl.float32)
    at = weight + tokens.to(tl.int64)[:, None] * weight_stride
    for h in tl.static_range(HEADS):
        products = tl.zeros((tokens.shape[0], DEPTH), tl.float32)
        for first in range(0, depth, DEPTH):
            k = (first + tl.arange(0, DEPTH)).to(tl.int64)[None, :]
            x = tl.load(hidden_states + k * depth_stride, mask=k < depth, other=0.0)
            w = tl.load(at + k * weight_depth_stride, mask=there[:, None] & (k < depth), other=0.0)
            products += x.to(tl.float32) * w.to(x.dtype).to(tl.float32)
        found = tl.where(heads == h, tl.sum(products, axis=1)[:, None], found)
        hidden_states += head_stride
    return found


# Of tokens (T,): s from their logits.
@triton.jit
def _mixed(tokens, there, logits, alpha, key, row, bias):
    s = gumbel_at(key, row + tl.zeros_like(tokens), tokens) + tl.sum(alpha * logits, axis=1)
    if bias is not None:
        s += tl.load(bias + tokens, mask=there, other=0.0).to(tl.float32)
    return s


# Of tokens (T,): F[v]·r, r of length 1.
@triton.jit
def _embedding_products(
    tokens, there, embedding, grad, inverse_norm, depth, stride, depth_stride, DEPTH: tl.constexpr
):  # fmt: skip
    products = tl.zeros((tokens.shape[0], DEPTH), tl.float32)
    at = embedding + tokens.to(tl.int64)[:, None] * stride
    for first in range(0, depth, DEPTH):
        k = (first + tl.arange(0, DEPTH)).to(tl.int64)[None, :]
        r = tl.load(grad + k, mask=k < depth, other=0.0).to(tl.float32) * inverse_norm
        f = tl.load(at + k * depth_stride, mask=there[:, None] & (k < depth), other=0.0)
        products += r * f.to(tl.float32)
    return tl.sum(products, axis=1)


# α of a row (1, PADDED_HEADS), 0 beyond its heads.
@triton.jit
def _alpha(mixture_logits, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr):
    heads = tl.arange(0, PADDED_HEADS)[None, :]
    alpha = tl.load(mixture_logits + heads * head_stride, mask=heads < HEADS, other=-float("inf")).to(tl.float32)
    alpha = tl.exp(alpha - tl.max(alpha, axis=1)[:, None])
    return alpha / tl.sum(alpha, axis=1)[:, None]


# ‖r‖.
@triton.jit
def _norm(grad, depth, DEPTH: tl.constexpr):
    squares = tl.zeros((DEPTH,), tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        r = tl.load(grad + k, mask=k < depth, other=0.0).to(tl.float32)
        squares += r * r
    return tl.sqrt(tl.sum(squares))


# The gradient of a row's mixture logits from the tokens that were kept: dα_k = Σ dz_v (E[v]·h^(k)), then softmax
# backward. Products count from those of the drawn token, so that what they have in common cancels; y is divided by what
# it adds up to. Where a product rounds otherwise than those that drew, a token above the drawn one counts as equal.
@triton.jit
def _gradient_kernel(
    grad_mixture, candidates, token_ids, peak, grad, hidden_states, mixture_logits, weight, bias, embedding, seed,
    inverse_temperature, scale, vocabulary, depth, embedding_depth, first_row, kept_stride,
    hidden_head_stride, hidden_stride, hidden_depth_stride, mixture_stride, mixture_head_stride,
    weight_stride, weight_depth_stride, embedding_stride, embedding_depth_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    hidden_states += row.to(tl.int64) * hidden_stride
    grad += row.to(tl.int64) * embedding_depth
    kept = candidates + row.to(tl.int64) * kept_stride
    key, noise_row, count = tl.load(seed), first_row + row, tl.load(kept)
    alpha = _alpha(mixture_logits + row.to(tl.int64) * mixture_stride, mixture_head_stride, HEADS, PADDED_HEADS)
    norm = _norm(grad, embedding_depth, DEPTH)
    inverse_norm = tl.where(norm == 0, 0.0, 1 / norm)

    drawn = tl.load(token_ids + row + tl.arange(0, 1)).to(tl.int32)
    drawn_logits = _head_logits(
        drawn, drawn >= 0, weight, hidden_states, depth, weight_stride, weight_depth_stride, hidden_head_stride,
        hidden_depth_stride, HEADS, PADDED_HEADS, DEPTH,
    )  # fmt: skip
    zero = _mixed(drawn, drawn >= 0, drawn_logits, alpha, key, noise_row, bias)
    product = _embedding_products(
        drawn, drawn >= 0, embedding, grad, inverse_norm, embedding_depth, embedding_stride, embedding_depth_stride,
        DEPTH,
    )  # fmt: skip

    total, delta = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    plain, weighted = tl.zeros_like(alpha), tl.zeros_like(alpha)  # Σ y E·h, and with F·r
    for first in range(0, tl.where(count < 0, vocabulary, count), TOKENS):
        i = first + tl.arange(0, TOKENS)
        there = i < tl.where(count < 0, vocabulary, count)
        tokens = tl.where(count < 0, i, tl.load(kept + 1 + i, mask=i < count, other=0))
        logits = _head_logits(
            tokens, there, weight, hidden_states, depth, weight_stride, weight_depth_stride, hidden_head_stride,
            hidden_depth_stride, HEADS, PADDED_HEADS, DEPTH,
        )  # fmt: skip
        fr = _embedding_products(
            tokens, there, embedding, grad, inverse_norm, embedding_depth, embedding_stride, embedding_depth_stride,
            DEPTH,
        )  # fmt: skip
        exponent = (_mixed(tokens, there, logits, alpha, key, noise_row, bias) - zero) * inverse_temperature
        y = tl.exp(tl.where((exponent > 0) | (tokens == drawn), 0.0, exponent))
        y = tl.where(there, y, 0.0)
        y_fr = tl.where(there, y * (fr - product), 0.0)
        rest = tl.where(there[:, None], logits - drawn_logits, 0.0)
        total += tl.sum(y)
        delta += tl.sum(y_fr)
        plain += tl.sum(y[:, None] * rest, axis=0)[None, :]
        weighted += tl.sum(y_fr[:, None] * rest, axis=0)[None, :]

    share = 1 / total
    grad_alpha = (weighted - (delta * share)[:, None] * plain) * (share * norm * scale)[:, None]
    result = alpha * (grad_alpha - tl.sum(alpha * grad_alpha))
    result = tl.where(tl.abs(tl.load(peak + row)) < float("inf"), result, float("nan"))
    heads = tl.arange(0, PADDED_HEADS)[None, :]
    tl.store(
        grad_mixture + row.to(tl.int64) * HEADS + heads, result.to(grad_mixture.dtype.element_ty), mask=heads < HEADS
    )


def draw(drawn: Drawn, candidates: Tensor, block: HeadLogits, noise: Noise) -> None:
    """Write the sample of these positions, and ``candidates`` (m, KEPT), int32: how many tokens matter, and these; −1
    where there is no room for them."""
    logits, mixture_logits, bias, first_row = block
    heads, m, width = logits.shape
    # logits of 16-bit rows may be in fp32 (on a CPU)
    distance = reach(logits.dtype, noise.temperature) or reach(torch.float16, noise.temperature)
    if m == 0:
        return
    strides = (0, 0) if mixture_logits is None else mixture_logits.stride()
    programs = min(m, persistent_programs(logits, _PROGRAMS))
    marks = triton.cdiv(width, _COLUMNS) * (_COLUMNS // 32)
    scratch = logits.new_empty(programs, 2 * _SCRATCH + marks, dtype=torch.int32)
    _draw_kernel[(programs,)](
        *drawn, candidates, scratch, logits, mixture_logits, bias, noise.seed, _inverse(noise), distance,
        torch.finfo(logits.dtype).eps, m, width, padded_columns(logits), noise.first_row + first_row,
        *logits.stride()[:2], *strides, candidates.stride(0), HEADS=heads, PADDED_HEADS=triton.next_power_of_2(heads),
        COLUMNS=_COLUMNS, WORDS=_WORDS, AGAIN=_AGAIN, ROOM=_SCRATCH, KEPT=candidates.shape[1], num_warps=_NUM_WARPS,
    )  # fmt: skip


def mixture_gradient(
    grad_values: Tensor, heads: Heads, projection: Projection, embedding: Tensor, drawn: Drawn, candidates: Tensor,
    noise: Noise, scale: float,
) -> Tensor:  # fmt: skip
    """(M, K) in the dtype of the mixture logits, times ``scale``; ``grad_values`` contiguous."""
    hidden_states, mixture_logits = heads
    assert mixture_logits is not None
    (k, m, d), grad = hidden_states.shape, torch.empty_like(mixture_logits, memory_format=torch.contiguous_format)
    if m > 0:
        weight, bias = projection
        _gradient_kernel[(m,)](
            grad, candidates, *drawn, grad_values, hidden_states, mixture_logits, weight, bias, embedding, noise.seed,
            _inverse(noise), scale / noise.temperature, len(weight), d, embedding.shape[1], noise.first_row,
            candidates.stride(0), *hidden_states.stride(), *mixture_logits.stride(), *weight.stride(),
            *embedding.stride(), HEADS=k, PADDED_HEADS=triton.next_power_of_2(k), DEPTH=_DEPTH,
            TOKENS=_INTERPRETED_TOKENS if grad.device.type == "cpu" else _TOKENS,
        )  # fmt: skip
    return grad
