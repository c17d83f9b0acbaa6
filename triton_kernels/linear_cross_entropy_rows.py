"""The row pass of the chunked linear cross entropy: logits from one GEMM to their gradient for the next two.
Mathematics: repdeg_fast/reference/linear_cross_entropy.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .tile import add_exponentials, origin
from .tuning import Specialization, choose, padded_columns, padded_vector, variants

_SUM_ROWS, _SUM_COLUMNS = 64, 64


@dataclass(frozen=True)
class RowBlock:
    """``columns`` logits of a row a step."""

    columns: int
    num_warps: int


# 16 logits a thread: several 16-byte loads in flight, and registers for four programs a multiprocessor in 16 bits
_BLOCKS = (RowBlock(4096, 8), RowBlock(8192, 8), RowBlock(4096, 4), RowBlock(8192, 16))


@triton.jit
def softcapped(z, softcap):
    return softcap * (1 - 2 / (1 + tl.exp(2 * z / softcap)))


# A row of logits to its gradient, in place. It must be read once and written once: the second read finds the row
# (60 KB at V = 30,522 in bf16) in L2. `width` is the vocabulary with the padding behind it, which is written too.
@triton.jit
def _rows_kernel(
    logits, lse, loss, target, bias, scale,
    vocabulary, width, positions, first_row, ignore_index, row_stride, scale_stride, label_smoothing, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    block = tl.arange(0, BLOCK)
    label = tl.load(target + (first_row + row) % positions).to(tl.int64)
    counted = label != ignore_index
    valid = (label >= 0) & (label < vocabulary)
    # read before anything is written: the reductions below hold all threads back until then
    z_label = tl.load(logits + label, mask=counted & valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z_label += tl.load(bias + label, mask=counted & valid, other=0.0)
    if SOFTCAP:
        z_label = softcapped(z_label, softcap)
    most = -float("inf")
    sum_exp = 0.0
    sum_z = 0.0
    for first in range(0, vocabulary, BLOCK):
        columns = first + block
        z = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < width, other=0.0)
        if SOFTCAP:
            z = softcapped(z, softcap)
        before = origin(most)
        z, most, sum_exp = add_exponentials(tl.where(columns < vocabulary, z, -float("inf")), most, sum_exp)
        if SMOOTHING:  # relative to the origin, like the exponentials
            sum_z += (before - origin(most)) * first + tl.sum(tl.where(columns < vocabulary, z, 0.0), axis=0)
    zero = origin(most)
    rest = tl.log(sum_exp)  # lse is zero + rest, of which zero may be large: it is left out of differences
    value = rest + (1 - label_smoothing) * (zero - z_label) - label_smoothing * (sum_z / vocabulary)
    value = tl.where(valid, value, float("nan"))
    tl.store(lse + row, zero + rest)
    tl.store(loss + row, tl.where(counted, value, 0.0))
    g = tl.load(scale + row * scale_stride)
    g = tl.where(valid, g, float("nan"))
    inverse = 1 / sum_exp
    for first in range(0, vocabulary, BLOCK):
        columns = first + block
        z = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < width, other=0.0)
        if SOFTCAP:
            z = softcapped(z, softcap)
        gradient = tl.exp(z - zero) * inverse - label_smoothing / vocabulary
        gradient = g * (gradient - tl.where(columns == label, 1 - label_smoothing, 0.0))
        if SOFTCAP:
            gradient *= 1 - (z / softcap) * (z / softcap)
        gradient = tl.where(counted, gradient, 0.0)  # an ignored row gives nothing even where it is not a number
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < width)


# Bias gradient: column sums of the (R, V) gradient, read once; each program owns its columns and adds rows in order.
@triton.jit
def _column_sum_kernel(
    logits, grad_bias, rows, vocabulary, width, row_stride,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (columns < width)[None, :]
        sums += tl.load(logits + row.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(sums, axis=0)
    if ACCUMULATE:
        result += tl.load(grad_bias + columns, mask=columns < vocabulary, other=0.0)
    tl.store(grad_bias + columns, result, mask=columns < vocabulary)


def rows(
    logits: Tensor, lse: Tensor, loss: Tensor, grad_bias: Tensor | None, target: Tensor, bias: Tensor | None,
    scale: Tensor, lse_scale: None, vocabulary: int, first_row: int, first_column: int,
    ignore_index: int, label_smoothing: float, softcap: float, accumulate_bias: bool,
) -> None:  # fmt: skip
    """Logits (R, V) to their gradient, in place; writes the loss and log-sum-exp of each row and the bias gradient.
    Where rows are padded to a multiple of 16 columns or more, the padding up to there is overwritten."""
    n, row_stride, width = len(logits), logits.stride(0), padded_columns(logits)
    bias = padded_vector(bias, width)
    block = choose("linear_cross_entropy.rows", _BLOCKS, logits, v=vocabulary)
    _rows_kernel[(n,)](
        logits, lse, loss, target, bias, scale,
        vocabulary, width, len(target), first_row, ignore_index, row_stride, scale.stride(0), label_smoothing, softcap,
        HAS_BIAS=bias is not None, SOFTCAP=softcap != 0, SMOOTHING=label_smoothing != 0,
        BLOCK=block.columns, num_warps=block.num_warps,
    )  # fmt: skip
    if grad_bias is not None:
        _column_sum_kernel[(triton.cdiv(vocabulary, _SUM_COLUMNS),)](
            logits, grad_bias, n, vocabulary, width, row_stride,
            ACCUMULATE=accumulate_bias, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS,
        )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """What :func:`rows` asks the compiler for, over dtypes and options."""
    for dtype in ("bf16", "fp32"):
        for full in (False, True):
            yield from variants(_BLOCKS, partial(_rows_specialization, dtype, full))
        types = {"logits": f"*{dtype}", "grad_bias": "*fp32"}
        types |= dict.fromkeys(("rows", "vocabulary", "width", "row_stride"), "i32")
        constants = {"ACCUMULATE": True, "ROWS": _SUM_ROWS, "COLUMNS": _SUM_COLUMNS}
        yield Specialization(_column_sum_kernel, types, constants, divisible=("width", "row_stride"), label=dtype)


def _rows_specialization(dtype: str, full: bool, block: RowBlock) -> Specialization:
    integers = ("vocabulary", "width", "positions", "first_row", "ignore_index", "row_stride", "scale_stride")
    types = {"logits": f"*{dtype}", "lse": "*fp32", "loss": "*fp32", "target": "*i64", "scale": "*fp32"}
    types |= dict.fromkeys(integers, "i32") | dict.fromkeys(("label_smoothing", "softcap"), "fp32")
    constants: dict[str, Any] = {"SOFTCAP": full, "SMOOTHING": full, "BLOCK": block.columns}
    constants |= optional(types, full, bias="*fp32")
    return Specialization(
        _rows_kernel, types, constants | {"HAS_BIAS": full}, block.num_warps, divisible=("width", "row_stride"),
        label=f"{dtype} {'all options' if full else 'plain'}",
    )  # fmt: skip


def optional(types: dict[str, str], given: bool, **arguments: str) -> dict[str, None]:
    """Arguments that are pointers where given, else compile-time ``None``."""
    types |= arguments if given else {}
    return {} if given else dict.fromkeys(arguments)
