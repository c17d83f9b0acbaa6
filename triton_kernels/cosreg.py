"""CosReg in Triton. Mathematics: ``repdeg_fast/reference/cosreg.py``.

Bandwidth-bound: forward must read W once, backward must read W and write its gradient once. A persistent grid keeps
each program's share of the column sum in registers, so W is read exactly once and only (programs × d) partial sums
go through memory. Two launches forward, one backward; no float atomics, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import RowTile, Specialization, choose, persistent_programs, row_tile, variants

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
    HAS_ROW_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
        inverse = tl.where(squared == 0, 0.0, 1 / tl.maximum(tl.sqrt(squared), eps, tl.PropagateNan.ALL))
        inverse = tl.where(squared == float("inf"), float("nan"), inverse)  # an overflow must not look like a zero row
        # ‖ŵ‖² is 1 by definition, and less only where eps is what divides
        unit = tl.where(inverse * eps < 1, 1.0, squared * inverse * inverse)
        unit = tl.where(inverse == 0, 0.0, unit)
        if HAS_ROW_WEIGHT:
            p = tl.load(row_weight + rows, mask=inside, other=0.0)
            p = tl.where(p < 0, float("nan"), p)
        else:
            p = tl.where(inside, 1.0, 0.0)
        column_sum += x * (p * inverse)[:, None]
        self_sum += p * p * unit
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


# grad = a·s − b·x a row, with a = 2 g p / (P² ‖w‖) and b = a (s·ŵ) / ‖w‖; s stays in registers for the whole program.
@triton.jit
def _backward_kernel(
    grad_weight, grad_value, weight, row_weight, column_sum, inverse_norm, total_weight,
    n, d, row_stride, column_stride, grad_row_stride, grad_column_stride, largest_inverse,
    HAS_ROW_WEIGHT: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    column_offsets = columns.to(tl.int64) * column_stride
    s = tl.load(column_sum + columns, mask=columns < d, other=0.0)
    if HAS_ROW_WEIGHT:
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
        p = tl.load(row_weight + rows, mask=inside, other=0.0) if HAS_ROW_WEIGHT else 1.0
        # where eps is what divides, ŵ is linear in w and nothing is projected out
        along = tl.where(inverse >= largest_inverse, p, tl.sum(x * s[None, :], axis=1) * inverse)
        a = scale * p * inverse
        gradient = a[:, None] * s[None, :] - (a * along * inverse)[:, None] * x
        out = grad_weight + wide_rows * grad_row_stride + columns.to(tl.int64)[None, :] * grad_column_stride
        if ACCUMULATE:
            gradient += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, gradient.to(grad_weight.dtype.element_ty), mask=mask)


def forward(weight: Tensor, row_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R (), column sum (d,), inverse norms (N,) and total weight (), all fp32. One read of ``weight``."""
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
        HAS_ROW_WEIGHT=row_weight is not None, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    _reduce_kernel[(blocks,)](
        partial_sum, partials[0], partials[1], block_square, counter, column_sum, value, total_weight,
        programs, d, blocks,
        **_reduce_constants(programs, blocks),
    )  # fmt: skip
    return value, column_sum, inverse_norm, total_weight


def backward(
    grad_weight: Tensor, grad_value: Tensor, weight: Tensor, row_weight: Tensor | None, column_sum: Tensor,
    inverse_norm: Tensor, total_weight: Tensor | None, eps: float, accumulate: bool,
) -> None:  # fmt: skip
    """Write grad_value · ∂R/∂W over ``grad_weight``, or add it where ``accumulate``."""
    n, d = weight.shape
    tile = choose("cosreg.backward", _tiles(_BACKWARD, d), weight, n=n, d=d)
    programs = min(triton.cdiv(n, tile.rows), persistent_programs(weight, tile.programs))
    _backward_kernel[(programs,)](
        grad_weight, grad_value, weight, row_weight, column_sum, inverse_norm, total_weight,
        n, d, weight.stride(0), weight.stride(1), grad_weight.stride(0), grad_weight.stride(1), 1 / eps,
        HAS_ROW_WEIGHT=row_weight is not None, ACCUMULATE=accumulate,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip


def _tiles(table: Sequence[tuple[int, int]], d: int) -> list[RowTile]:
    return [row_tile(d, values, programs) for values, programs in table]


def _reduce_constants(programs: int, blocks: int) -> dict[str, int]:
    return {
        "PROGRAMS": _REDUCE_PROGRAMS,
        "COLUMNS": _REDUCE_COLUMNS,
        "ALL_PROGRAMS": triton.next_power_of_2(programs),
        "ALL_BLOCKS": triton.next_power_of_2(blocks),
    }


def specializations() -> Iterator[Specialization]:
    """What the launchers above ask the compiler for, over dtypes and row lengths."""
    for dtype, d in [*(("bf16", d) for d in (64, 768, 2304, 8192, 16384)), ("fp32", 768), ("fp16", 768)]:
        yield from variants(_tiles(_FORWARD, d), partial(_forward_specialization, dtype, d, d == 768))
        yield from variants(_tiles(_BACKWARD, d), partial(_backward_specialization, dtype, d, d == 768, d != 2304))
    for programs, d in ((3, 64), (528, 2304), (528, 16384)):
        yield _reduce_specialization(programs, d)


def _forward_specialization(dtype: str, d: int, weighted: bool, tile: RowTile) -> Specialization:
    types = dict.fromkeys(("inverse_norm", "partial_sum", "partial_self", "partial_total"), "*fp32")
    types |= {"weight": f"*{dtype}", "counter": "*i32", "n": "i32", "d": "i32", "row_stride": "i32", "eps": "fp32"}
    constants: dict[str, Any] = {"HAS_ROW_WEIGHT": weighted, "ROWS": tile.rows, "COLUMNS": tile.columns}
    constants["column_stride"] = 1
    if weighted:
        types["row_weight"] = "*fp32"
    else:
        constants["row_weight"] = None
    return Specialization(
        _forward_kernel, types, constants, tile.num_warps, divisible=("d", "row_stride"), label=f"{dtype} d={d}"
    )


def _backward_specialization(dtype: str, d: int, weighted: bool, accumulate: bool, tile: RowTile) -> Specialization:
    types = dict.fromkeys(("grad_value", "column_sum", "inverse_norm"), "*fp32")
    types |= dict.fromkeys(("weight", "grad_weight"), f"*{dtype}")
    types |= dict.fromkeys(("n", "d", "row_stride", "grad_row_stride"), "i32") | {"largest_inverse": "fp32"}
    constants: dict[str, Any] = {"column_stride": 1, "grad_column_stride": 1, "ACCUMULATE": accumulate}
    constants |= {"HAS_ROW_WEIGHT": weighted, "ROWS": tile.rows, "COLUMNS": tile.columns}
    if weighted:
        types |= dict.fromkeys(("row_weight", "total_weight"), "*fp32")
    else:
        constants |= {"row_weight": None, "total_weight": None}
    label = f"{dtype} d={d}" + (" accumulate" if accumulate else "")
    divisible = ("d", "row_stride", "grad_row_stride")
    return Specialization(_backward_kernel, types, constants, tile.num_warps, divisible=divisible, label=label)


def _reduce_specialization(programs: int, d: int) -> Specialization:
    types = dict.fromkeys(("partial_sum", "partial_self", "partial_total", "column_sum", "value"), "*fp32")
    types |= {"total_weight": "*fp32", "block_square": "*fp64", "counter": "*i32"}
    types |= dict.fromkeys(("programs", "d", "blocks"), "i32")
    constants = _reduce_constants(programs, triton.cdiv(d, _REDUCE_COLUMNS))
    return Specialization(_reduce_kernel, types, constants, divisible=("d",), label=f"programs={programs} d={d}")
