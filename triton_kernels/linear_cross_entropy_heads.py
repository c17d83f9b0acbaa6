"""What the linear cross entropy counts, adds up and scales beside its rows, one launch each, and what it makes again
where its heads weigh differently. Mathematics: repdeg_fast/reference/linear_cross_entropy.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_cross_entropy import choose_tile, forward, heads_of, product_constants
from .linear_cross_entropy_rows import class_weights
from .tile import heads_differ, loss_gradient, product, shares, softcapped, weight_of
from .tuning import persistent_programs

if TYPE_CHECKING:
    from repdeg_fast.contracts.linear_cross_entropy import Gradients, GradRows, Head, LossRule, Upstream

_BLOCK = 1024
_SCALE_BLOCK = 4096


# 1 over the number of targets that count, or over their weights. One program: as many as a few thousand targets are.
@triton.jit
def _share_kernel(share, target, class_weight, positions, vocabulary, ignore_index, BLOCK: tl.constexpr):
    counted = tl.zeros((BLOCK,), tl.int32 if class_weight is None else tl.float64)
    for first in range(0, positions, BLOCK):
        at = first + tl.arange(0, BLOCK)
        label = tl.load(target + at, mask=at < positions, other=0).to(tl.int64)
        counts = (label != ignore_index) & (at < positions)
        if class_weight is None:
            counted += counts.to(tl.int32)
        else:
            valid = (label >= 0) & (label < vocabulary)
            counted += tl.load(class_weight + label, mask=counts & valid, other=0.0).to(tl.float64)
    total = tl.sum(counted, axis=0).to(tl.float32)
    tl.store(share, 1.0 / tl.where(total == 0, 1.0, total))


# The losses of a head, added up in double.
@triton.jit
def _total_kernel(total, losses, share, positions, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    losses += head.to(tl.int64) * positions
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, positions, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(losses + at, mask=at < positions, other=0.0).to(tl.float64)
    tl.store(total + head, (tl.sum(sums, axis=0) * tl.load(share)).to(tl.float32))


# x *= scale, leaving at once where that changes nothing: how the usual upstream gradient of 1 costs no pass over dE. x
# is `n` values of each head, scaled by its own, or (HEADS > 1) a sum over heads, scaled where all have the same.
@triton.jit
def _scale_kernel(x, grad_heads, grad_heads_stride, n, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1)
    factor = tl.load(grad_heads + head * grad_heads_stride).to(tl.float32)
    if HEADS > 1:
        if heads_differ(grad_heads, grad_heads_stride, HEADS):
            return
    if factor == 1:
        return
    x += head.to(tl.int64) * n
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(x + at, (value * factor).to(x.dtype.element_ty), mask=at < n)


@dataclass(frozen=True)
class VocabularyTile:
    """``columns`` of the vocabulary × ``rows`` logits at a time, multiplied in steps of ``depth``; a program owns
    ``width`` columns of the weight's gradient."""

    columns: int
    rows: int
    depth: int
    width: int
    num_warps: int
    num_stages: int


# dE and db where heads weigh differently, from logits made again, tile by tile. Only the device knows whether they do,
# and a library's product cannot ask it: hence a kernel that leaves at once where they do not. A program owns COLUMNS
# words and WIDTH columns of their gradient, which stay in registers; the d/WIDTH programs that share words make the
# logits each for itself. Operations: 2·N·V·d for the gradient and as much for the logits times d/WIDTH.
@triton.jit
def _vocabulary_kernel(
    grad_weight, grad_bias, hidden_states, weight, target, bias, lse, grad_loss, grad_lse_square, grad_heads,
    class_weight, class_total, n, vocabulary, positions, d, ignore_index,
    hidden_row, hidden_column, weight_row, weight_column, grad_heads_stride,
    label_smoothing, softcap, gradient_filter, HEADS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if not heads_differ(grad_heads, grad_heads_stride, HEADS):
        return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (columns < vocabulary)[:, None]
    total = tl.zeros((COLUMNS, WIDTH), tl.float32)
    bias_total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS)
        z = product(
            weight, hidden_states, columns, rows, vocabulary, n, d,
            weight_row, weight_column, hidden_row, hidden_column, DTYPE, PRECISION, DEPTH,
        )  # fmt: skip
        if bias is not None:
            z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[:, None]
        if softcap is not None:
            z = softcapped(z, softcap)
        label = tl.load(target + rows % positions, mask=rows < n, other=ignore_index).to(tl.int64)
        of_label, of_all = shares(class_weight, class_total, label, label_smoothing, vocabulary)
        g = tl.load(grad_loss + rows, mask=rows < n, other=0.0)
        g = tl.where((label >= 0) & (label < vocabulary), g, float("nan"))
        g = tl.where(label == ignore_index, 0.0, g)
        of_lse = tl.load(lse + rows, mask=rows < n, other=0.0)
        total_of_p = g * of_all
        if grad_lse_square is not None:
            of_square = 2 * tl.load(grad_lse_square + rows, mask=rows < n, other=0.0) * of_lse
            total_of_p += tl.where(label == ignore_index, 0.0, of_square)
        p = tl.exp(z - of_lse[None, :])
        of_each = (g * (label_smoothing / vocabulary))[None, :]
        if class_weight is not None:
            of_each = of_each * weight_of(class_weight, columns, vocabulary)[:, None]
        dz = loss_gradient(
            p, z, label[None, :], columns[:, None], total_of_p[None, :], (g * of_label)[None, :], of_each, softcap,
            gradient_filter,
        )  # fmt: skip
        used = (g != 0) | (total_of_p != 0)
        dz = tl.where(inside & used[None, :], dz, 0.0)
        if grad_bias is not None:
            bias_total += tl.sum(dz, axis=1)
        if grad_weight is not None:
            values = tl.load(
                hidden_states + rows.to(tl.int64)[:, None] * hidden_row + at.to(tl.int64)[None, :] * hidden_column,
                mask=(rows < n)[:, None] & (at < d)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(dz.to(DTYPE), values.to(DTYPE), total, input_precision=PRECISION)
    if grad_weight is not None:
        out = grad_weight + columns.to(tl.int64)[:, None] * d + at[None, :]
        tl.store(out, total.to(grad_weight.dtype.element_ty), mask=inside & (at < d)[None, :])
    if grad_bias is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias + columns, bias_total.to(grad_bias.dtype.element_ty), mask=columns < vocabulary)


def share(head: Head, rule: LossRule, mean: bool) -> Tensor:
    """1, or 1 over the number of targets that count, or over the sum of their classes' weights."""
    if not mean:
        return head.hidden_states.new_ones((), dtype=torch.float32)
    result = head.hidden_states.new_empty((), dtype=torch.float32)
    class_weight, _ = class_weights(rule)
    sizes = (head.target.shape[0], head.weight.shape[0])
    _share_kernel[(1,)](result, head.target, class_weight, *sizes, rule.ignore_index, BLOCK=_BLOCK)
    return result


def total(losses: Tensor, heads: int, share: Tensor) -> Tensor:
    """(K,)"""
    result = losses.new_empty(heads)
    _total_kernel[(heads,)](result, losses, share, losses.shape[0] // heads, BLOCK=_BLOCK)
    return result


def rescale_(gradients: Gradients, grad_heads: Tensor, rows: GradRows, head: Head, rule: LossRule) -> None:
    """Turn the gradients of Σ loss into those of Σ grad_heads·loss, without asking the device what grad_heads is. Those
    of rows belong to one head each; of those that are sums over heads, kernels that return at once where one scale
    serves make what it does not serve again."""
    grad_hidden, grad_weight, grad_bias = gradients
    heads = grad_heads.shape[0]
    if grad_hidden is not None:
        _scale(grad_hidden, grad_heads, heads)
    for gradient in (grad_weight, grad_bias):
        if gradient is not None:
            _scale(gradient, grad_heads, 1)
    if heads > 1 and head.hidden_states.shape[0] and (grad_weight is not None or grad_bias is not None):
        _make_again(grad_weight, grad_bias, grad_heads, rows(), head, rule)


def _scale(gradient: Tensor, grad_heads: Tensor, of_heads: int) -> None:
    n = gradient.numel() // of_heads
    stride, heads = heads_of(grad_heads)
    blocks = min(triton.cdiv(n, _SCALE_BLOCK), triton.cdiv(persistent_programs(gradient, 8), of_heads))
    if n:
        sums_of = heads if of_heads == 1 else 1
        _scale_kernel[(blocks, of_heads)](gradient, grad_heads, stride, n, HEADS=sums_of, BLOCK=_SCALE_BLOCK)


def _make_again(
    grad_weight: Tensor | None, grad_bias: Tensor | None, grad_heads: Tensor, rows: Upstream, head: Head,
    rule: LossRule,
) -> None:  # fmt: skip
    hidden_states, weight, target, bias = head
    (n, d), vocabulary = hidden_states.shape, weight.shape[0]
    stride, heads = heads_of(grad_heads)
    _, lse = forward(head, rule, None, grad_heads)
    tile = choose_tile("vocabulary", VOCABULARY_TILES, head)
    of_square = rows.grad_lse_square
    slices = 1 if grad_weight is None else triton.cdiv(d, tile.width)
    _vocabulary_kernel[(triton.cdiv(vocabulary, tile.columns), slices)](
        grad_weight, grad_bias, hidden_states, weight, target, bias, lse, rows.grad_loss.contiguous(),
        None if of_square is None else of_square.contiguous(), grad_heads, *class_weights(rule),
        n, vocabulary, target.shape[0], d, rule.ignore_index, *hidden_states.stride(), *weight.stride(), stride,
        rule.label_smoothing, rule.softcap or None, rule.gradient_filter or None,
        HEADS=heads, **product_constants(hidden_states),
        COLUMNS=tile.columns, ROWS=tile.rows, DEPTH=tile.depth, WIDTH=tile.width,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# By chip and operands, as FORWARD_TILES. An fp32 weight beside 16-bit rows passes through registers and, for want of
# them, goes in steps of 32.
_V = VocabularyTile
VOCABULARY_TILES: dict[tuple[str, str], Sequence[VocabularyTile]] = {
    ("sm_80", "16x16"): [_V(64, 64, 64, 256, 8, 3)],
    ("sm_90", "16x16"): [_V(64, 64, 64, 256, 8, 3)],
    ("sm_100", "16x16"): [_V(64, 64, 64, 256, 8, 3)],
    ("gfx942", "16x16"): [_V(64, 64, 32, 128, 4, 2)],
    ("sm_80", "16x32"): [_V(64, 64, 64, 256, 8, 3)],
    ("sm_90", "16x32"): [_V(64, 64, 32, 256, 8, 3)],
    ("sm_100", "16x32"): [_V(64, 64, 64, 256, 8, 3)],
    ("gfx942", "16x32"): [_V(64, 64, 32, 128, 4, 2)],
    ("sm_80", "32x32"): [_V(64, 32, 32, 64, 8, 2)],
    ("sm_90", "32x32"): [_V(64, 32, 32, 64, 8, 2)],
    ("sm_100", "32x32"): [_V(64, 64, 32, 64, 8, 2)],
    ("gfx942", "32x32"): [_V(64, 32, 32, 64, 4, 2)],
}
