"""The row kernels of the measures over pairs in Triton. Mathematics: ``repdeg_fast/reference/pairwise.py``.

One (R, W) buffer of cosines comes from the GEMM and goes to the next two GEMMs as slopes: read once and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .tuning import choose, padded_columns, padded_vector

if TYPE_CHECKING:
    from repdeg_fast.contracts.pairwise import Block, Rule

SQUARE, ABS, RELU, EXP = map(tl.constexpr, range(4))  # as in repdeg_fast/contracts/pairwise.py
OWN, LOWER = map(tl.constexpr, (1, 2))


@dataclass(frozen=True)
class RowBlock:
    """``columns`` cosines of a row a step."""

    columns: int
    num_warps: int


_BLOCKS: Sequence[RowBlock] = (RowBlock(4096, 8), RowBlock(8192, 16))


@triton.jit
def counts(columns, own, width, LEFT_OUT: tl.constexpr):
    """Which columns of a row there are, and are not left out."""
    inside = columns < width
    if LEFT_OUT == OWN:
        return inside & (columns != own)
    elif LEFT_OUT == LOWER:
        return inside & (columns > own)
    else:
        return inside


# `width` is the number of columns, `padded` with the padding behind them, which is read and written, too.
@triton.jit
def _measure_kernel(
    cosines, sums, keep_rows, keep_columns, origin,
    width, padded, row_stride, diagonal, parameter,
    KIND: tl.constexpr, LEFT_OUT: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cosines += row.to(tl.int64) * row_stride
    keep_row = tl.load(keep_rows + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, padded, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        c = tl.load(cosines + columns, mask=columns < padded, other=0.0).to(tl.float32)
        keep = tl.load(keep_columns + columns, mask=columns < padded, other=0.0)
        if KIND == SQUARE:
            value = c * c
            slope = 2 * c
        elif KIND == ABS:
            value = tl.abs(c)
            slope = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))
        elif KIND == RELU:
            value = tl.where(c <= parameter, 0.0, c - parameter)
            slope = tl.where(value > 0, 1.0, value)
        else:
            value = tl.exp(parameter * c - tl.load(origin))
            slope = value
        counted = counts(columns, diagonal + row, width, LEFT_OUT)
        nothing = keep * keep_row == 0  # a cosine that is 0, or NaN where the other vector is, and stays
        total += tl.where(counted, tl.where(nothing, c, value), 0.0)
        if SLOPES:
            slope = tl.where(counted, tl.where(nothing, c, slope), 0.0).to(cosines.dtype.element_ty)
            tl.store(cosines + columns, slope, mask=columns < padded)
    tl.store(sums + row, tl.sum(total))


@triton.jit
def _maxima_kernel(
    cosines, values, index, keep_columns,
    width, padded, row_stride, diagonal,
    LEFT_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cosines += row.to(tl.int64) * row_stride
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.full((BLOCK,), -1, tl.int32)
    for first in range(0, padded, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        c = tl.load(cosines + columns, mask=columns < padded, other=0.0).to(tl.float32)
        keep = tl.load(keep_columns + columns, mask=columns < padded, other=0.0)
        c = tl.where(counts(columns, diagonal + row, width, LEFT_OUT) & (keep != 0), c, float("-inf"))
        better = (c > best) | ((c != c) & (best == best))  # NaN is larger than all else, the first of equals stays
        best = tl.where(better, c, best)
        at = tl.where(better, columns, at)
    nan = best != best
    most = tl.max(tl.where(nan, float("inf"), best), axis=0)
    some_nan = tl.max(nan.to(tl.int32), axis=0) > 0
    holds = tl.where(some_nan, nan, (best == most) & (at >= 0))
    where = tl.min(tl.where(holds, at, 2147483647), axis=0)
    none = where == 2147483647
    tl.store(values + row, tl.where(some_nan, float("nan"), tl.where(none, 0.0, most)))
    tl.store(index + row, tl.where(none, -1, where).to(tl.int64))


def measure(block: Block, rule: Rule, sums: Tensor, *, slopes: bool) -> None:
    """See the contract. Where rows are padded to a multiple of 16 columns, the padding is overwritten."""
    cosines, keep_rows, keep_columns, diagonal, left_out = block
    rows, columns = cosines.shape
    padded = padded_columns(cosines)
    config = choose("pairwise.measure", _BLOCKS, cosines, columns=columns)
    _measure_kernel[(rows,)](
        cosines, sums, keep_rows, padded_vector(keep_columns, padded), rule.origin,
        columns, padded, cosines.stride(0), diagonal, float(rule.parameter),
        KIND=int(rule.kind), LEFT_OUT=int(left_out), SLOPES=slopes, BLOCK=config.columns, num_warps=config.num_warps,
    )  # fmt: skip


def maxima(block: Block, values: Tensor, index: Tensor) -> None:
    """See the contract."""
    cosines, _, keep_columns, diagonal, left_out = block
    rows, columns = cosines.shape
    padded = padded_columns(cosines)
    config = choose("pairwise.maxima", _BLOCKS, cosines, columns=columns)
    _maxima_kernel[(rows,)](
        cosines, values, index, padded_vector(keep_columns, padded),
        columns, padded, cosines.stride(0), diagonal,
        LEFT_OUT=int(left_out), BLOCK=config.columns, num_warps=config.num_warps,
    )  # fmt: skip
