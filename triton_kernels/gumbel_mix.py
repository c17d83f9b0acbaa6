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
HEAD_BLOCKS = (Block(1024, 8), Block(512, 4))  # of several heads: 4 a thread of each


# α of rows: the largest mixture logit and 1/Σ exp(logit − largest). NaN anywhere makes all of them NaN.
@triton.jit
def _softmax(logits, rows, m, stride, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr):
    head = tl.arange(0, PADDED_HEADS)[None, :]
    inside = (rows < m)[:, None] & (head < HEADS)
    all_logits = tl.load(logits + rows.to(tl.int64)[:, None] * stride + head * head_stride, mask=inside, other=0.0)
    all_logits = tl.where(head < HEADS, all_logits.to(tl.float32), float("-inf"))
    most = tl.max(all_logits, axis=1)
    return most, 1 / tl.sum(tl.exp(all_logits - most[:, None]), axis=1)


# α_k of rows, from what _softmax found.
@triton.jit
def _share(logits, k, rows, m, stride, head_stride, most, inverse):
    logit = tl.load(logits + rows.to(tl.int64) * stride + k * head_stride, mask=rows < m, other=0.0)
    return tl.exp(logit.to(tl.float32) - most) * inverse


# α of rows, a head each; nothing where nothing is mixed.
@triton.jit
def shares_of(
    logits, rows, m, stride, head_stride, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr
):  # fmt: skip
    if logits is None:
        return ()
    else:
        most, inverse = _softmax(logits, rows, m, stride, head_stride, HEADS, PADDED_HEADS)
        shares = ()
        for h in tl.static_range(HEADS):
            one = (_share(logits, h, rows, m, stride, head_stride, most, inverse),)
            shares = shares + one  # type: ignore[assignment]
        return shares


# `s` with the bias and the heads' mixed logits more; `head` and `bias` point at what belongs to each of its values, of
# which there are those `inside`, and of the bias those that are `real`.
@triton.jit
def add_logits(s, head, bias, real, inside, shares, head_stride):
    if bias is not None:
        s += tl.load(bias, mask=real, other=0.0).to(tl.float32)
    if len(shares) == 0:
        s += tl.load(head, mask=inside, other=0.0).to(tl.float32)
    for h in tl.static_range(len(shares)):
        s += tl.load(head, mask=inside, other=0.0).to(tl.float32) * shares[h][:, None]
        head += head_stride  # step by step: h·stride may need 64 bits
    return s


# h̄ = Σ α_k h^(k), summed in fp32.
@triton.jit
def _mix_kernel(
    mixed, hidden_states, mixture_logits, m, depth,
    hidden_head_stride, hidden_stride, hidden_depth_stride, mixture_stride, mixture_head_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    most, inverse = _softmax(mixture_logits, rows, m, mixture_stride, mixture_head_stride, HEADS, PADDED_HEADS)
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = (rows < m)[:, None] & (k < depth)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        head = hidden_states + rows.to(tl.int64)[:, None] * hidden_stride + k * hidden_depth_stride
        for h in tl.static_range(HEADS):
            share = _share(mixture_logits, h, rows, m, mixture_stride, mixture_head_stride, most, inverse)
            total += share[:, None] * tl.load(head, mask=inside, other=0.0).to(tl.float32)
            head += hidden_head_stride  # step by step: h·stride may need 64 bits
        at = rows.to(tl.int64)[:, None] * depth + k
        tl.store(mixed + at, total.to(mixed.dtype.element_ty), mask=inside)


# What is known of rows, after some logits more: the largest z + g so far, its token, Σ exp((z + g − largest)/τ). The
# logits are those of K heads, mixed here, or of their mixture.
@triton.jit
def _look_kernel(
    most_out, token_ids, total_out, logits, mixture_logits, bias, seed, inverse_temperature,
    m, width, padded_width, first_column, first_row, head_stride, row_stride, mixture_stride, mixture_head_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < m
    key = tl.load(seed)
    shares = shares_of(mixture_logits, rows, m, mixture_stride, mixture_head_stride, HEADS, PADDED_HEADS)
    most = tl.load(most_out + rows, mask=inside, other=0.0)
    token = tl.load(token_ids + rows, mask=inside, other=0)
    total = tl.load(total_out + rows, mask=inside, other=0.0)
    for begin in tl.range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        s = gumbel(key, first_row + rows, first_column + begin, COLUMNS)
        head = logits + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
        real, there = (columns < width)[None, :], inside[:, None] & (columns < padded_width)[None, :]
        s = add_logits(
            s, head, None if bias is None else bias + first_column + columns[None, :], real, there, shares, head_stride
        )
        s = tl.where((columns < width)[None, :], s, float("-inf"))
        # a NaN is nobody's maximum, but stays in the sum
        here, index = tl.max(tl.where(s == s, s, float("-inf")), axis=1, return_indices=True)
        token = tl.where(here > most, (first_column + begin + index).to(tl.int64), token)
        new = tl.maximum(most, here)
        zero = origin(new)
        total *= tl.exp((most - zero) * inverse_temperature)
        total += tl.sum(tl.exp((s - zero[:, None]) * inverse_temperature), axis=1)
        most = new
    tl.store(most_out + rows, most, mask=inside)
    tl.store(token_ids + rows, token, mask=inside)
    tl.store(total_out + rows, total, mask=inside)


# F[x̂] of rows; NaN where nothing could be drawn.
@triton.jit
def _embed_kernel(
    values, embedding, token_ids, peak, m, depth, stride, depth_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(token_ids + rows, mask=rows < m, other=0)
    drawn = tl.abs(tl.load(peak + rows, mask=rows < m, other=0.0)) < float("inf")
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = (rows < m)[:, None] & (k < depth)
        value = tl.load(embedding + token[:, None] * stride + k * depth_stride, mask=inside, other=0.0)
        value = tl.where(drawn[:, None], value, float("nan")).to(values.dtype.element_ty)
        tl.store(values + rows.to(tl.int64)[:, None] * depth + k, value, mask=inside)


# What y and y F·r of rows count from: z + g of the drawn token and, where there is an upstream gradient, F[x̂]·r. r is
# brought to length 1 first: neither do large gradients overflow in fp16, nor do small ones vanish. Operands are rounded
# to the dtype that gets multiplied.
@triton.jit
def _origins_kernel(
    perturbed, products, norms, unit, mixed, weight, bias, embedding, grad, token_ids, seed,
    m, depth, embedding_depth, first_row,
    mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride,
    embedding_stride, embedding_depth_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.load(token_ids + rows, mask=rows < m, other=0)
    mixed += rows[:, None] * mixed_stride
    weight += token[:, None] * weight_stride
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = (rows < m)[:, None] & (k < depth)
        x = tl.load(mixed + k * mixed_depth_stride, mask=inside, other=0.0)
        w = tl.load(weight + k * weight_depth_stride, mask=inside, other=0.0)
        total += x.to(tl.float32) * w.to(x.dtype).to(tl.float32)
    s = gumbel_at(tl.load(seed), first_row + rows, token) + tl.sum(total, axis=1)
    if bias is not None:
        s += tl.load(bias + token).to(tl.float32)
    tl.store(perturbed + rows, s, mask=rows < m)
    if grad is not None:
        grad += rows[:, None] * embedding_depth
        unit += rows[:, None] * embedding_depth
        embedding += token[:, None] * embedding_stride
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, embedding_depth, BLOCK):
            k = first + tl.arange(0, BLOCK)[None, :]
            r = tl.load(grad + k, mask=(rows < m)[:, None] & (k < embedding_depth), other=0.0).to(tl.float32)
            squares += r * r
        norm = tl.sqrt(tl.sum(squares, axis=1))
        inverse = tl.where(norm == 0, 0.0, 1 / norm)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, embedding_depth, BLOCK):
            k = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
            inside = (rows < m)[:, None] & (k < embedding_depth)
            r = tl.load(grad + k, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
            r = r.to(unit.dtype.element_ty)
            tl.store(unit + k, r, mask=inside)
            f = tl.load(embedding + k * embedding_depth_stride, mask=inside, other=0.0)
            total += r.to(tl.float32) * f.to(r.dtype).to(tl.float32)
        tl.store(norms + rows, norm, mask=rows < m)
        tl.store(products + rows, tl.sum(total, axis=1), mask=rows < m)


# Rows of logits to y and, where `weighted` is given, of products F·r to y (F·r − product), each over its own memory in
# the dtype that gets multiplied; and their sums so far, of the values as they are stored: what is taken off a sum of
# rounded numbers must be made of the same ones.
# y = peak · exp((z + g − origin)/τ), where origin is z + g of the drawn token and peak its y, the largest. Where a
# product rounds otherwise than the sweep that drew, another token may come out above it, at a small τ far above: it
# counts as equal.
@triton.jit
def _weights_kernel(
    y_out, weighted, total, delta, logits, products_out, bias, perturbed, products, token_ids, peak, seed,
    inverse_temperature, m, width, padded_width, first_column, first_row, row_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < m
    key, token = tl.load(seed), tl.load(token_ids + rows, mask=there, other=0)
    zero, scale = tl.load(perturbed + rows, mask=there, other=0.0), tl.load(peak + rows, mask=there, other=0.0)
    sum_y = tl.zeros((ROWS, COLUMNS), tl.float32)
    if weighted is not None:
        product = tl.load(products + rows, mask=there, other=0.0)
        sum_weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in tl.range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        inside = there[:, None] & (columns < padded_width)[None, :]
        at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
        out_at = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        s = tl.load(logits + at, mask=inside, other=0.0)
        if weighted is not None:
            fr = tl.load(products_out + at, mask=inside, other=0.0)
        s += gumbel(key, first_row + rows, first_column + begin, COLUMNS)
        if bias is not None:
            s += tl.load(bias + first_column + columns[None, :], mask=(columns < width)[None, :], other=0.0).to(
                tl.float32
            )
        exponent = (s - zero[:, None]) * inverse_temperature
        is_drawn = (first_column + columns)[None, :] == token[:, None]
        y = tl.exp(tl.where((exponent > 0) | is_drawn, 0.0, exponent)) * scale[:, None]
        y = tl.where((columns < width)[None, :], y, 0.0).to(y_out.dtype.element_ty)
        tl.debug_barrier()  # values of 16 bits go where other threads' logits of this step were
        tl.store(y_out + out_at, y, mask=inside)  # the padding too
        sum_y += y.to(tl.float32)
        if weighted is not None:
            w = tl.where((columns < width)[None, :], y.to(tl.float32) * (fr - product[:, None]), 0.0)
            w = w.to(weighted.dtype.element_ty)
            tl.store(weighted + out_at, w, mask=inside)
            sum_weighted += w.to(tl.float32)
    tl.store(total + rows, tl.load(total + rows, mask=there) + tl.sum(sum_y, axis=1), mask=there)
    if weighted is not None:
        tl.store(delta + rows, tl.load(delta + rows, mask=there) + tl.sum(sum_weighted, axis=1), mask=there)


# The gradient of rows' mixture logits, from Σ y E, Σ y (F·r − product) E, Σ y and δ: dh̄·h^(k), then softmax backward.
# y adds up to 1 but for its rounding, and where it was drawn from other logits.
@triton.jit
def _mixture_gradient_kernel(
    grad_mixture, plain, weighted, total, delta, norms, hidden_states, mixture_logits, scale, m, depth,
    hidden_head_stride, hidden_stride, hidden_depth_stride, mixture_stride, mixture_head_stride,
    HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, row = rows < m, rows.to(tl.int64)[:, None]
    share = 1 / tl.load(total + rows, mask=there, other=1.0)
    mean = (tl.load(delta + rows, mask=there, other=0.0) * share)[:, None]
    factor = share * tl.load(norms + rows, mask=there, other=0.0) * scale
    heads = tl.arange(0, PADDED_HEADS)[None, :]
    grad_alpha = tl.zeros((ROWS, PADDED_HEADS), tl.float32)
    for h in tl.static_range(HEADS):
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, depth, BLOCK):
            k = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
            inside = there[:, None] & (k < depth)
            grad_mixed = tl.load(weighted + row * depth + k, mask=inside, other=0.0)
            grad_mixed -= mean * tl.load(plain + row * depth + k, mask=inside, other=0.0)
            hidden = tl.load(hidden_states + row * hidden_stride + k * hidden_depth_stride, mask=inside, other=0.0)
            products += grad_mixed * factor[:, None] * hidden.to(tl.float32)
        grad_alpha = tl.where(heads == h, tl.sum(products, axis=1)[:, None], grad_alpha)
        hidden_states += hidden_head_stride
    most, inverse = _softmax(mixture_logits, rows, m, mixture_stride, mixture_head_stride, HEADS, PADDED_HEADS)
    inside = there[:, None] & (heads < HEADS)
    logits = tl.load(mixture_logits + row * mixture_stride + heads * mixture_head_stride, mask=inside, other=0.0)
    alpha = tl.exp(logits.to(tl.float32) - most[:, None]) * inverse[:, None]
    alpha = tl.where(heads < HEADS, alpha, 0.0)
    grad = alpha * (grad_alpha - tl.sum(alpha * grad_alpha, axis=1)[:, None])
    tl.store(grad_mixture + row * HEADS + heads, grad.to(grad_mixture.dtype.element_ty), mask=inside)


def mix(heads: Heads) -> Tensor:
    """h̄ (M, d) in the dtype of the hidden states."""
    hidden_states, mixture_logits = heads
    if mixture_logits is None:
        return hidden_states[0]
    k, m, d = hidden_states.shape
    mixed = hidden_states.new_empty(m, d)
    if m > 0:
        rows = _rows(mixed)
        _mix_kernel[(triton.cdiv(m, rows),)](
            mixed, hidden_states, mixture_logits, m, d, *hidden_states.stride(), *mixture_logits.stride(),
            HEADS=k, PADDED_HEADS=triton.next_power_of_2(k), ROWS=rows, BLOCK=_BLOCK,
        )  # fmt: skip
    return mixed


def look(state: RowState, chunk: LogitChunk, mixture_logits: Tensor | None, noise: Noise) -> None:
    """Take in a chunk of the vocabulary."""
    logits, bias, (first_column, _), first_row = chunk
    heads, m, width = logits.shape
    if m == 0:
        return
    strides = (0, 0) if mixture_logits is None else mixture_logits.stride()
    blocks, rows = BLOCKS if heads == 1 else HEAD_BLOCKS, _rows(logits)
    block = choose("gumbel_mix.look" if heads == 1 else "gumbel_mix.look_at_heads", blocks, logits, v=width)
    _look_kernel[(triton.cdiv(m, rows),)](
        state.most, state.token_ids, state.total, logits, mixture_logits, bias, noise.seed, _inverse(noise),
        m, width, padded_columns(logits), first_column, noise.first_row + first_row, *logits.stride()[:2], *strides,
        HEADS=heads, PADDED_HEADS=triton.next_power_of_2(heads), ROWS=rows, COLUMNS=block.columns,
        num_warps=block.num_warps,
    )  # fmt: skip


def embed(embedding: Tensor, drawn: Drawn) -> Tensor:
    """F[x̂] (M, d_f)."""
    m, d = len(drawn.token_ids), embedding.shape[1]
    values = embedding.new_empty(m, d)
    if m > 0:
        rows = _rows(values)
        _embed_kernel[(triton.cdiv(m, rows),)](
            values, embedding, *drawn, m, d, *embedding.stride(), ROWS=rows, BLOCK=_BLOCK
        )
    return values


def origins(
    origin: Origin, grad_values: Tensor | None, mixed: Tensor, projection: Projection, embedding: Tensor,
    token_ids: Tensor, noise: Noise,
) -> None:  # fmt: skip
    """Write what a row's y and y F·r count from."""
    m, d = mixed.shape
    if m == 0:
        return
    (weight, bias), rows = projection, _rows(mixed)
    _origins_kernel[(triton.cdiv(m, rows),)](
        *origin, mixed, weight, bias, embedding, grad_values, token_ids, noise.seed, m, d,
        embedding.shape[1], noise.first_row, *mixed.stride(), *weight.stride(), *embedding.stride(), ROWS=rows,
        BLOCK=_DOT_BLOCK,
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
    block, rows = choose("gumbel_mix.weights", BLOCKS, y, v=width), _rows(y)
    _weights_kernel[(triton.cdiv(m, rows),)](
        y, weighted, *sums, logits, products, bias, origin.perturbed, origin.products, *drawn, noise.seed,
        _inverse(noise), m, width, padded_columns(logits), first_column, noise.first_row, logits.stride(1), y.stride(0),
        ROWS=rows, COLUMNS=block.columns, num_warps=block.num_warps,
    )  # fmt: skip


def mixture_gradient(
    weighted_sums: tuple[Tensor, Tensor], sums: Sums, norms: Tensor, heads: Heads, scale: float
) -> Tensor:
    """(M, K) in the dtype of the mixture logits, from Σ y E and Σ y (F·r − F[x̂]·r) E."""
    hidden_states, mixture_logits = heads
    assert mixture_logits is not None
    (k, m, d), grad = hidden_states.shape, torch.empty_like(mixture_logits, memory_format=torch.contiguous_format)
    if m > 0:
        rows = _rows(hidden_states)
        _mixture_gradient_kernel[(triton.cdiv(m, rows),)](
            grad, *weighted_sums, *sums, norms, hidden_states, mixture_logits, scale, m, d,
            *hidden_states.stride(), *mixture_logits.stride(),
            HEADS=k, PADDED_HEADS=triton.next_power_of_2(k), ROWS=rows, BLOCK=_BLOCK,
        )  # fmt: skip
    return grad


def _rows(tensor: Tensor) -> int:
    """Of a program: one. In the interpreter, where an operation costs about the same for many, 32."""
    return 32 if tensor.device.type == "cpu" else 1


def _inverse(noise: Noise) -> float:
    """1/τ as fp32 has it: ∞ · 0 would be NaN."""
    return min(1 / noise.temperature, torch.finfo(torch.float32).max)
