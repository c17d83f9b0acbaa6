"""Blocks of logits from one GEMM to their gradient for the next two. Mathematics:
repdeg_fast/reference/linear_cross_entropy.py.

*Chunked* has whole rows, whose log-sum-exp is not known yet: they are looked at twice, by so few programs that the
second look finds a row in the cache, and memory is read once and written once.
*Streaming* has tiles of rows whose log-sum-exp is known: nothing is to be reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from .tile import add_exponentials, loss_gradient, origin, shares, softcapped, weight_of
from .tuning import choose, padded_columns, padded_vector, persistent_programs

if TYPE_CHECKING:
    from repdeg_fast.contracts.linear_cross_entropy import Columns, LogitBlock, LossRule

_SUM_ROWS, _SUM_COLUMNS = 64, 64
_TILE_COLUMNS, _TILE_WARPS = 4096, 8  # 16 logits a thread: several 16-byte loads in flight
_L1 = 192 << 10  # bytes that rows may take of a multiprocessor's 256 KB


@dataclass(frozen=True)
class RowBlock:
    """``columns`` logits of a row a step, by at most ``programs`` a multiprocessor: fewer where L1 holds fewer rows."""

    columns: int
    num_warps: int
    programs: int


# 16 logits a thread: several 16-byte loads in flight, and registers for as many programs as L1 has room for rows. A row
# that is longer than a third of it is left to L2, by programs that keep 24 KB in flight.
_BLOCKS = (RowBlock(4096, 8, 4), RowBlock(4096, 8, 3), RowBlock(2048, 4, 6), RowBlock(8192, 16, 2))
_LONG_BLOCKS = (RowBlock(4096, 8, 3), RowBlock(4096, 8, 2), RowBlock(4096, 8, 4))


# softcap(logit + bias) in fp32.
@triton.jit
def _load_logits(logits, bias, columns, width, softcap):
    z = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < width, other=0.0)
    if softcap is not None:
        z = softcapped(z, softcap)
    return z


# Whether a row counts, and its label's logit. Read before anything of the row is written: the reductions that follow
# hold all threads back until then.
@triton.jit
def _load_label(logits, bias, label, vocabulary, ignore_index, softcap):
    counted = label != ignore_index
    valid = (label >= 0) & (label < vocabulary)
    z = tl.load(logits + label, mask=counted & valid, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + label, mask=counted & valid, other=0.0)
    if softcap is not None:
        z = softcapped(z, softcap)
    return counted, valid, z


# Loss and log-sum-exp of a row. lse is zero + rest, of which zero may be large: it is left out of differences. `of_z`,
# what label smoothing adds, is relative to zero, too.
@triton.jit
def _store_loss(loss, lse, row, counted, valid, zero, sum_exp, z_label, of_label, of_all, of_z):
    rest = tl.log(sum_exp)
    value = of_all * rest + of_label * (zero - z_label) - of_z
    tl.store(lse + row, zero + rest)
    tl.store(loss + row, tl.where(counted, tl.where(valid, value, float("nan")), 0.0))
    return zero + rest


# g, and u: an ignored row has no g, and gives nothing even where it is not a number.
@triton.jit
def _row_gradients(grad_loss, grad_lse, row, grad_loss_stride, counted, valid):
    g = tl.load(grad_loss + tl.cast(row, tl.int64) * grad_loss_stride)
    g = tl.where(counted, tl.where(valid, g, float("nan")), 0.0)
    u = 0.0
    if grad_lse is not None:
        u += tl.load(grad_lse + row)
    return g, u


# A row of logits to its gradient, in place, one row after the other. Bandwidth: read once, written once, for the second
# look finds the row in L1 (three of 60 KB, at V = 30,522 in bf16) or in L2, and begins where the first one ended.
# `width` is the vocabulary with the padding behind it, which is written too.
@triton.jit(do_not_specialize=["first_row"])
def _rows_kernel(
    logits, lse, loss, predicted, target, bias, grad_loss, grad_lse, grad_lse_square, class_weight, class_total,
    rows, vocabulary, width, positions, first_row, ignore_index, row_stride, grad_loss_stride, grad_lse_square_stride,
    label_smoothing, softcap, gradient_filter, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = logits + tl.cast(row, tl.int64) * row_stride
        label = tl.load(target + (first_row + row) % positions).to(tl.int64)
        counted, valid, z_label = _load_label(at, bias, label, vocabulary, ignore_index, softcap)
        of_label, of_all = shares(class_weight, class_total, label, label_smoothing, vocabulary)
        most = -float("inf")
        sum_exp = 0.0
        sum_z = 0.0
        seen = 0.0  # the weight of the columns so far
        best = 0
        for first in range(0, vocabulary, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            z = _load_logits(at, bias, columns, width, softcap)
            z = tl.where(columns < vocabulary, z, -float("inf"))
            if predicted is not None:
                largest = tl.max(z, axis=0)
                leftmost = tl.min(tl.where(z == largest, columns, vocabulary), axis=0)
                best = tl.where(largest > most, leftmost, best)
            before = origin(most)
            z, most, sum_exp = add_exponentials(z, most, sum_exp)
            if SMOOTHING:  # relative to the origin, like the exponentials
                z = tl.where(columns < vocabulary, z, 0.0)
                if class_weight is None:
                    sum_z += (before - origin(most)) * first + tl.sum(z, axis=0)
                else:
                    weight = weight_of(class_weight, columns, vocabulary)
                    sum_z += (before - origin(most)) * seen + tl.sum(weight * z, axis=0)
                    seen += tl.sum(weight, axis=0)
        zero = origin(most)
        of_z = label_smoothing / vocabulary * sum_z
        of_lse = _store_loss(loss, lse, row, counted, valid, zero, sum_exp, z_label, of_label, of_all, of_z)
        if predicted is not None:
            tl.store(predicted + row, tl.cast(best, tl.int64))
        g, u = _row_gradients(grad_loss, grad_lse, row, grad_loss_stride, counted, valid)
        if grad_lse_square is not None:
            of_square = tl.load(grad_lse_square + tl.cast(row, tl.int64) * grad_lse_square_stride)
            u += tl.where(counted, 2 * of_square * of_lse, 0.0)
        used = (g != 0) | (u != 0)
        column = tl.where(valid, label, -1).to(tl.int32)  # comparisons of 64 bits would take twice the registers
        inverse = 1 / sum_exp
        last = (vocabulary - 1) // BLOCK * BLOCK
        for back in range(0, vocabulary, BLOCK):
            columns = last - back + tl.arange(0, BLOCK)
            z = _load_logits(at, bias, columns, width, softcap)
            p = tl.exp(z - zero) * inverse
            of_each = g * (label_smoothing / vocabulary)
            if class_weight is not None:
                of_each = of_each * weight_of(class_weight, columns, vocabulary)
            dz = loss_gradient(
                p, z, column, columns, g * of_all + u, g * of_label, of_each, softcap, gradient_filter
            )  # fmt: skip
            tl.store(at + columns, tl.where(used, dz, 0.0).to(at.dtype.element_ty), mask=columns < width)


# A tile of the vocabulary, from `first_column`, of a row whose log-sum-exp is known; `gradient` may be `logits`.
# Bandwidth: each logit is read once, its gradient written once.
@triton.jit(do_not_specialize=["first_row", "first_column"])
def _tile_kernel(
    logits, gradient, lse, target, bias, grad_loss, grad_lse, class_weight, class_total,
    vocabulary, width, positions, first_row, first_column, ignore_index,
    row_stride, gradient_row_stride, grad_loss_stride, label_smoothing, softcap, gradient_filter, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(target + (first_row + row) % positions).to(tl.int64)
    counted, valid = label != ignore_index, (label >= 0) & (label < vocabulary)
    of_label, of_all = shares(class_weight, class_total, label, label_smoothing, vocabulary)
    g, u = _row_gradients(grad_loss, grad_lse, row, grad_loss_stride, counted, valid)
    z = _load_logits(logits + row.to(tl.int64) * row_stride, bias, columns, width, softcap)
    p = tl.exp(z - tl.load(lse + row))
    column = tl.where(valid, label - first_column, -1).to(tl.int32)
    of_each = g * (label_smoothing / vocabulary)
    if class_weight is not None:
        of_each = of_each * weight_of(class_weight, first_column + columns, vocabulary)
    dz = loss_gradient(p, z, column, columns, g * of_all + u, g * of_label, of_each, softcap, gradient_filter)
    dz = tl.where((g != 0) | (u != 0), dz, 0.0)
    gradient += row.to(tl.int64) * gradient_row_stride
    tl.store(gradient + columns, dz.to(gradient.dtype.element_ty), mask=columns < width)


# Bias gradient: column sums of the (R, W) gradient, read once; each program owns its columns and adds rows in order.
@triton.jit
def _column_sum_kernel(
    gradient, grad_bias, rows, columns_inside, width, row_stride,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (columns < width)[None, :]
        sums += tl.load(gradient + row.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(sums, axis=0)
    if ACCUMULATE:
        result += tl.load(grad_bias + columns, mask=columns < columns_inside, other=0.0)
    tl.store(grad_bias + columns, result, mask=columns < columns_inside)


def rows(block: LogitBlock, columns: Columns, rule: LossRule, accumulate_bias: bool) -> None:
    """Logits (R, W) to their gradient. Where rows are padded to a multiple of 16 columns or more, the padding up to
    there is overwritten. With ``loss``, columns are the whole vocabulary, and loss and log-sum-exp are written."""
    logits, grad_bias = block.logits, block.grad_bias
    gradient = logits if block.gradient is None else block.gradient
    if block.loss is None:
        _launch_tile(block, gradient, columns, rule)
    else:
        _launch_rows(block, columns.vocabulary, rule)
    if grad_bias is not None:
        (n, inside), row_stride = logits.shape, gradient.stride(0)
        _column_sum_kernel[(triton.cdiv(inside, _SUM_COLUMNS),)](
            gradient, grad_bias, n, inside, padded_columns(gradient), row_stride,
            ACCUMULATE=accumulate_bias, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS,
        )  # fmt: skip


def _launch_rows(block: LogitBlock, vocabulary: int, rule: LossRule) -> None:
    logits, lse, loss, _, target, first_row, bias, grad_loss, grad_lse, _, of_square, predicted = block
    assert grad_loss is not None
    n, width = logits.shape[0], padded_columns(logits)
    tensors = (
        logits, lse, loss, predicted, target, padded_vector(bias, width), grad_loss, grad_lse, of_square,
        *class_weights(rule),
    )  # fmt: skip
    strides = (logits.stride(0), grad_loss.stride(0), 0 if of_square is None else of_square.stride(0))
    sizes = (vocabulary, width, target.shape[0], first_row, rule.ignore_index, *strides)
    options: Any = (rule.label_smoothing, rule.softcap or None, rule.gradient_filter or None)
    smoothing = rule.label_smoothing != 0
    row_bytes = width * logits.element_size()
    fits = 3 * row_bytes <= _L1
    one = choose("linear_cross_entropy.rows", _BLOCKS if fits else _LONG_BLOCKS, logits, v=vocabulary)
    programs = persistent_programs(logits, min(one.programs, max(1, _L1 // row_bytes)) if fits else one.programs)
    _rows_kernel[(min(n, programs),)](
        *tensors, n, *sizes, *options, SMOOTHING=smoothing, BLOCK=one.columns, num_warps=one.num_warps
    )


def _launch_tile(block: LogitBlock, gradient: Tensor, columns: Columns, rule: LossRule) -> None:
    logits, lse, _, _, target, first_row, bias, grad_loss, grad_lse, *_ = block
    assert grad_loss is not None
    width = padded_columns(logits)
    options: Any = (rule.label_smoothing, rule.softcap or None, rule.gradient_filter or None)
    _tile_kernel[(logits.shape[0], triton.cdiv(width, _TILE_COLUMNS))](
        logits, gradient, lse, target, padded_vector(bias, width), grad_loss, grad_lse, *class_weights(rule),
        columns.vocabulary, width, target.shape[0], first_row, columns.first, rule.ignore_index,
        logits.stride(0), gradient.stride(0), grad_loss.stride(0), *options,
        BLOCK=_TILE_COLUMNS, num_warps=_TILE_WARPS,
    )  # fmt: skip


def class_weights(rule: LossRule) -> tuple[Tensor | None, Tensor | None]:
    """Of each class, and their sum."""
    return (None, None) if rule.class_weight is None else rule.class_weight
