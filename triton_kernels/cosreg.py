"""CosReg in Triton. Mathematics: ``repdeg_fast/reference/cosreg.py``.

Bandwidth-bound: forward must read W once, backward must read W and write its gradient once. A persistent grid keeps
each program's share of the column sum in registers, so W is read exactly once and only (programs × d) partial sums
go through memory. Two launches forward, one backward; no float atomics, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import RowTile, choose, persistent_programs, row_tile

if TYPE_CHECKING:
    from repdeg_fast.contracts.cosreg import Rows, Saved

TINY, ENLARGE = tl.constexpr(2.0**-96), tl.constexpr(2.0**64)
_REDUCE_COLUMNS = 32
_REDUCE_PROGRAMS = 64
# (values a step, programs a multiprocessor), the one that ships first. Forward: with 4 loads of 16 bytes a thread,
# 32 KiB are in flight on each. Backward: 4096 values make ptxas spill when the old gradient is held as well.
_FORWARD = ((4096, 4), (2048, 8), (4096, 8))
_BACKWARD = ((2048, 8), (1024, 16), (2048, 6))


# For each row: load it once, take its norm, add its share of Σ p ŵ to the program's accumulator; all from registers.
# The accumulator has a row for each row of the tile, so that rows are added up across threads once, at the end.
@triton.jit
def _forward_kernel(
    weight, row_weight, inverse_norm, partial_sum, partial_self, partial_total, counter,
    n, d, row_stride, column_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    column_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    self_sum = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(program * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < n
        offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
        x = tl.load(weight + offsets, mask=inside[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)
        squared = tl.sum(x * x, axis=1)
        norm = tl.where(squared == float("inf"), float("nan"), tl.sqrt(squared))  # must not look like a zero row
        if tl.min(squared) < TINY:  # squares of tiny values are lost: those rows are looked at again, enlarged
            enlarged = tl.sqrt(tl.sum((x * ENLARGE) * (x * ENLARGE), axis=1)) / ENLARGE
            norm = tl.where(squared < TINY, enlarged, norm)
        inverse = tl.where(norm == 0, 0.0, 1 / tl.maximum(norm, eps, tl.PropagateNan.ALL))
        # ‖ŵ‖ is 1 by definition, and less only where eps is what divides
        unit = tl.where(inverse * eps < 1, 1.0, norm * inverse)
        unit = tl.where(norm == 0, 0.0, unit)
        if row_weight is not None:
            p = tl.load(row_weight + rows, mask=inside, other=0.0)
            p = tl.where(p < 0, float("nan"), p)
        else:
            p = tl.where(inside, 1.0, 0.0)
        column_sum += x * (p * inverse)[:, None]
        self_sum += p * p * unit * unit
        total += p
        tl.store(inverse_norm + rows, inverse, mask=inside)
    tl.store(partial_sum + program.to(tl.int64) * d + columns, tl.sum(column_sum, axis=0), mask=columns < d)
    tl.store(partial_self + program, tl.sum(self_sum))
    tl.store(partial_total + program, tl.sum(total))
    if program == 0:
        tl.store(counter, 0)  # for the next launch


# Column blocks of Σ over programs. The last program to finish (an integer counter) adds up the blocks' squares in
# block order, so that R needs no third launch and does not depend on who was last.
@triton.jit
def _reduce_kernel(
    partial_sum, partial_self, partial_total, block_square, counter, column_sum, value, total_weight,
    programs, d, blocks,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, ALL_PROGRAMS: tl.constexpr, ALL_BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
    for first in range(0, programs, PROGRAMS):
        rows = first + tl.arange(0, PROGRAMS)
        mask = (rows < programs)[:, None] & (columns < d)[None, :]
        sums += tl.load(partial_sum + rows.to(tl.int64)[:, None] * d + columns[None, :], mask=mask, other=0.0)
    s = tl.sum(sums.to(tl.float64), axis=0)
    tl.store(column_sum + columns, s.to(tl.float32), mask=columns < d)
    tl.store(block_square + block, tl.sum(s * s))
    if tl.atomic_add(counter, 1, sem="acq_rel") == blocks - 1:
        at = tl.arange(0, ALL_BLOCKS)
        square = tl.sum(tl.load(block_square + at, mask=at < blocks, other=0.0))
        at = tl.arange(0, ALL_PROGRAMS)
        self_sum = tl.sum(tl.load(partial_self + at, mask=at < programs, other=0.0).to(tl.float64))
        total = tl.sum(tl.load(partial_total + at, mask=at < programs, other=0.0).to(tl.float64))
        tl.store(value, ((square - self_sum) / (total * total)).to(tl.float32))
        tl.store(total_weight, total.to(tl.float32))


# grad = a·(s − (s·ŵ) ŵ) a row, with a = 2 g p / (P² ‖w‖); s stays in registers for the whole program.
@triton.jit
def _backward_kernel(
    grad_weight, grad_value, weight, row_weight, column_sum, inverse_norm, total_weight,
    n, d, row_stride, column_stride, grad_row_stride, grad_column_stride, largest_inverse,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    column_offsets = columns.to(tl.int64) * column_stride
    s = tl.load(column_sum + columns, mask=columns < d, other=0.0)
    if total_weight is not None:
        total = tl.load(total_weight)
    else:
        total = n * 1.0
    scale = 2 * tl.load(grad_value) / (total * total)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < n
        mask = inside[:, None] & (columns < d)[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        x = tl.load(weight + wide_rows * row_stride + column_offsets[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_norm + rows, mask=inside, other=0.0)
        p = tl.load(row_weight + rows, mask=inside, other=0.0) if row_weight is not None else 1.0
        unit = x * inverse[:, None]
        # where eps is what divides, ŵ is linear in w and nothing is projected out
        along = tl.where(inverse >= largest_inverse, p, tl.sum(unit * s[None, :], axis=1))
        gradient = (s[None, :] - along[:, None] * unit) * (scale * p * inverse)[:, None]
        out = grad_weight + wide_rows * grad_row_stride + columns.to(tl.int64)[None, :] * grad_column_stride
        if ACCUMULATE:
            gradient += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, gradient.to(grad_weight.dtype.element_ty), mask=mask)


def forward(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One read of the weight."""
    weight, row_weight, eps = rows
    n, d = weight.shape
    tile = choose("cosreg.forward", _tiles(_FORWARD, d), weight, n=n, d=d)
    programs = min(triton.cdiv(n, tile.rows), persistent_programs(weight, tile.programs))
    blocks = triton.cdiv(d, _REDUCE_COLUMNS)
    empty = lambda *shape: weight.new_empty(shape, dtype=torch.float32)  # noqa: E731
    inverse_norm, partial_sum, partials = empty(n), empty(programs, d), empty(2, programs)
    value, column_sum, total_weight = empty(), empty(d), empty()
    counter = weight.new_empty((), dtype=torch.int32)
    block_square = weight.new_empty(blocks, dtype=torch.float64)
    _forward_kernel[(programs,)](
        weight, row_weight, inverse_norm, partial_sum, partials[0], partials[1], counter,
        n, d, weight.stride(0), weight.stride(1), eps,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    _reduce_kernel[(blocks,)](
        partial_sum, partials[0], partials[1], block_square, counter, column_sum, value, total_weight,
        programs, d, blocks,
        PROGRAMS=_REDUCE_PROGRAMS, COLUMNS=_REDUCE_COLUMNS,
        ALL_PROGRAMS=triton.next_power_of_2(programs), ALL_BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return value, column_sum, inverse_norm, total_weight


def backward(grad_weight: Tensor, grad_value: Tensor, rows: Rows, saved: Saved, *, accumulate: bool) -> None:
    """One read of the weight, one write of its gradient."""
    weight, row_weight, eps = rows
    n, d = weight.shape
    tile = choose("cosreg.backward", _tiles(_BACKWARD, d), weight, n=n, d=d)
    programs = min(triton.cdiv(n, tile.rows), persistent_programs(weight, tile.programs))
    _backward_kernel[(programs,)](
        grad_weight, grad_value, weight, row_weight, *saved,
        n, d, weight.stride(0), weight.stride(1), grad_weight.stride(0), grad_weight.stride(1), 1 / eps,
        ACCUMULATE=accumulate, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip


def _tiles(table: Sequence[tuple[int, int]], d: int) -> list[RowTile]:
    return [row_tile(d, values, programs) for values, programs in table]
