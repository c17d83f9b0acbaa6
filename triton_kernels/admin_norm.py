"""ADMIN's residual block in Triton. Mathematics: ``repdeg_fast/reference/admin_norm.py``.

Bandwidth-bound: forward must read x and the branch and write y, backward must read dy and y (and x, for dω) and write
dx and df. A row of up to ``_WHOLE`` columns is held in registers from its load to its store. A persistent grid loads
the parameters once a program and keeps the program's share of their gradients in registers, so that only (programs × d)
partial sums go through memory; a second launch adds them up. No float atomics: the same input gives the same bits.

Longer rows are read twice: forward goes over a row in chunks, first for its mean and variance (the second reading
mostly hits the cache); backward takes the row means of its gradient in a launch of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import dropout_mask
from .tuning import RowTile, choose, persistent_programs

if TYPE_CHECKING:
    from repdeg_fast.contracts.admin_norm import Affine, Dropout, Gradients, Norm, Residual, Saved, Wanted

_FORWARD_WHOLE = 8192  # columns; longer rows spill
_BACKWARD_WHOLE = 4096
_CHUNK = 2048
_SPLIT_COLUMNS = 256  # of a program, where backward does not hold whole rows
# (values a thread, warps a multiprocessor), the one that ships first: 8 values leave room for four parameters or their
# sums beside them in registers, and the warps are what these hold; backward, each program is also a row of partial sums
_FORWARD = ((8, 32), (8, 16), (16, 16))
_BACKWARD = ((8, 16), (8, 24), (4, 16))
_REDUCE_COLUMNS = 32
_REDUCE_PROGRAMS = 64


@triton.jit
def _parameter(pointer, columns, d, absent: tl.constexpr):
    """A parameter's values at ``columns``; ``absent`` where there is no such parameter or no such column."""
    if pointer is None:
        values = tl.full((columns.shape[0],), absent, tl.float32)
    else:
        values = tl.load(pointer + columns, mask=columns < d, other=absent)
    return values


@triton.jit
def _block(pointer, rows, columns, n, d, row_stride):
    """fp32 values of a matrix at rows × columns, 0 outside it."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(pointer + at, mask=(rows < n)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _keep(seed, rows, first_column, dropout, scale, COLUMNS: tl.constexpr):
    """1/(1−p) where dropout keeps a value, else 0; the number 1 without dropout."""
    if seed is None:
        keep = 1.0
    else:
        keep = tl.where(dropout_mask(tl.load(seed), rows, first_column, dropout, COLUMNS), scale, 0.0)
    return keep


@triton.jit
def _inverse_deviation(squares, count, shift, eps):
    """1/√(variance + eps) from Σ of the squares around a point at a distance of ``shift`` from the mean. Rounded to
    nearest, since a whole row gets its error; by subtraction a variance may come out below 0."""
    variance = tl.div_rn(squares, count * 1.0) - shift * shift
    return tl.div_rn(1.0, tl.sqrt_rn(tl.where(variance < 0, 0.0, variance) + eps))


# A tile of whole rows a step: their sum, mean, variance and output from one load of each input.
@triton.jit
def _forward_kernel(
    y, mean, rstd, x, branch, omega, weight, bias, branch_bias, seed,
    n, d, x_stride, branch_stride, dropout, scale, eps,
    CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    inside = (columns < d)[None, :]
    omega_values = _parameter(omega, columns, d, 1.0)[None, :]
    weight_values = _parameter(weight, columns, d, 1.0)[None, :]
    bias_values = _parameter(bias, columns, d, 0.0)[None, :]
    branch_bias_values = _parameter(branch_bias, columns, d, 0.0)[None, :]
    share = 1.0 / d  # the mean's last digit is put right below
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        keep = _keep(seed, rows, 0, dropout, scale, COLUMNS)
        z = _block(x, rows, columns, n, d, x_stride) * omega_values
        z += (_block(branch, rows, columns, n, d, branch_stride) + branch_bias_values) * keep
        mu = tl.sum(z, axis=1) * share if CENTER else tl.zeros((ROWS,), tl.float32)
        centered = tl.where(inside, z - mu[:, None], 0.0)
        # the mean has lost digits where a row is far from zero; the mean of what is left around it has them
        shift = tl.sum(centered, axis=1) * share if CENTER else tl.zeros((ROWS,), tl.float32)
        r = _inverse_deviation(tl.sum(centered * centered, axis=1), d, shift, eps)
        mu += shift
        out = (z - mu[:, None]) * r[:, None] * weight_values + bias_values
        at = rows.to(tl.int64)[:, None] * d + columns[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=(rows < n)[:, None] & inside)
        tl.store(mean + rows, mu, mask=rows < n)
        tl.store(rstd + rows, r, mask=rows < n)


@triton.jit
def _chunk_sum(
    x, branch, omega, branch_bias, seed, row, first, n, d, x_stride, branch_stride, dropout, scale,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """z of COLUMNS columns of one row, [1, COLUMNS]."""
    columns = first + tl.arange(0, COLUMNS)
    rows = row + tl.arange(0, 1)
    keep = _keep(seed, rows, first, dropout, scale, COLUMNS)
    z = _block(x, rows, columns, n, d, x_stride) * _parameter(omega, columns, d, 1.0)[None, :]
    f = _block(branch, rows, columns, n, d, branch_stride) + _parameter(branch_bias, columns, d, 0.0)[None, :]
    return z + f * keep


# One long row a program. Mean and variance of the chunks, taken around the mean of the first one, are merged exactly
# (Chan, Golub and LeVeque), so that a row far from zero loses nothing; then the row is made again and written.
@triton.jit
def _long_forward_kernel(
    y, mean, rstd, x, branch, omega, weight, bias, branch_bias, seed,
    n, d, x_stride, branch_stride, dropout, scale, eps,
    CENTER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    origin = 0.0
    shift = 0.0
    squares = 0.0
    for first in tl.range(0, d, COLUMNS):
        z = _chunk_sum(
            x, branch, omega, branch_bias, seed, row, first, n, d, x_stride, branch_stride,
            dropout, scale, COLUMNS,
        )  # fmt: skip
        if CENTER:
            inside = (first + tl.arange(0, COLUMNS) < d)[None, :]
            count = tl.minimum(COLUMNS, d - first).to(tl.float32)
            if first == 0:
                origin = tl.sum(z) / count
            z = tl.where(inside, z - origin, 0.0)
            chunk_mean = tl.sum(z) / count
            z = tl.where(inside, z - chunk_mean, 0.0)
            step = chunk_mean - shift
            shift += step * (count / (first + count))
            squares += step * step * (first * (count / (first + count)))
        squares += tl.sum(z * z)
    mu = origin + shift
    r = _inverse_deviation(squares, d, 0.0, eps)
    for first in tl.range(0, d, COLUMNS):
        z = _chunk_sum(
            x, branch, omega, branch_bias, seed, row, first, n, d, x_stride, branch_stride,
            dropout, scale, COLUMNS,
        )  # fmt: skip
        columns = first + tl.arange(0, COLUMNS)
        out = (z - mu) * r * _parameter(weight, columns, d, 1.0)[None, :]
        out += _parameter(bias, columns, d, 0.0)[None, :]
        at = row.to(tl.int64) * d + columns[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=(columns < d)[None, :])
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)


@triton.jit
def _normalized(
    y, x, branch, omega, weight, bias, branch_bias, keep, mean, rstd, rows, columns, n, d, x_stride, branch_stride,
):  # fmt: skip
    """n at rows × columns: (y − β)/γ, 0 where γ is 0, or from the inputs where there is no ``y``."""
    if y is not None:
        scale = _parameter(weight, columns, d, 1.0)
        inverse = tl.where(scale == 0, 0.0, 1 / scale)[None, :]
        normalized = (_block(y, rows, columns, n, d, d) - _parameter(bias, columns, d, 0.0)[None, :]) * inverse
    else:
        z = _block(x, rows, columns, n, d, x_stride) * _parameter(omega, columns, d, 1.0)[None, :]
        f = _block(branch, rows, columns, n, d, branch_stride) + _parameter(branch_bias, columns, d, 0.0)[None, :]
        mu = tl.load(mean + rows, mask=rows < n, other=0.0)[:, None]
        normalized = (z + f * keep - mu) * tl.load(rstd + rows, mask=rows < n, other=0.0)[:, None]
    return normalized


# The means of g and g ⊙ n of one long row a program.
@triton.jit
def _means_kernel(
    means, grad_y, y, x, branch, omega, weight, bias, branch_bias, seed, mean, rstd,
    n, d, x_stride, branch_stride, dropout, scale,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    sums = tl.zeros((1, COLUMNS), tl.float32)
    products = tl.zeros((1, COLUMNS), tl.float32)
    for first in tl.range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        keep = _keep(seed, rows, first, dropout, scale, COLUMNS)
        normalized = _normalized(
            y, x, branch, omega, weight, bias, branch_bias, keep, mean, rstd, rows, columns, n, d,
            x_stride, branch_stride,
        )  # fmt: skip
        g = _block(grad_y, rows, columns, n, d, d) * _parameter(weight, columns, d, 1.0)[None, :]
        sums += g
        products += g * normalized
    tl.store(means + 2 * row, tl.sum(sums) / d)
    tl.store(means + 2 * row + 1, tl.sum(products) / d)


# A tile of rows × columns a step; WHOLE tiles have whole rows and take the row means themselves. The parameters' sums
# have a row for each row of the tile, so that rows are added up across threads once, at the end.
@triton.jit
def _backward_kernel(
    grad_x, grad_branch, partial, means, grad_y, y, x, branch, omega, weight, bias, branch_bias, seed, mean, rstd,
    n, d, x_stride, branch_stride, dropout, scale,
    CENTER: tl.constexpr, WHOLE: tl.constexpr, SUM_OMEGA: tl.constexpr, SUM_AFFINE: tl.constexpr,
    SUM_BRANCH_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first_column = tl.program_id(1) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    weight_values = _parameter(weight, columns, d, 1.0)[None, :]
    omega_values = _parameter(omega, columns, d, 1.0)[None, :]
    omega_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    branch_bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(program * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        keep = _keep(seed, rows, first_column, dropout, scale, COLUMNS)
        normalized = _normalized(
            y, x, branch, omega, weight, bias, branch_bias, keep, mean, rstd, rows, columns, n, d,
            x_stride, branch_stride,
        )  # fmt: skip
        upstream = _block(grad_y, rows, columns, n, d, d)
        g = upstream * weight_values
        if WHOLE:
            c1 = tl.sum(g, axis=1) / d
            c2 = tl.sum(g * normalized, axis=1) / d
        else:
            c1 = tl.load(means + 2 * rows, mask=rows < n, other=0.0)
            c2 = tl.load(means + 2 * rows + 1, mask=rows < n, other=0.0)
        g -= c2[:, None] * normalized
        if CENTER:
            g -= c1[:, None]
        dz = g * tl.load(rstd + rows, mask=rows < n, other=0.0)[:, None]
        df = dz * keep
        at = rows.to(tl.int64)[:, None] * d + columns[None, :]
        mask = (rows < n)[:, None] & (columns < d)[None, :]
        tl.store(grad_x + at, (dz * omega_values).to(grad_x.dtype.element_ty), mask=mask)
        if grad_branch is not None:
            tl.store(grad_branch + at, df.to(grad_branch.dtype.element_ty), mask=mask)
        if SUM_OMEGA:
            omega_sum += dz * _block(x, rows, columns, n, d, x_stride)
        if SUM_AFFINE:
            weight_sum += upstream * normalized
            bias_sum += upstream
        if SUM_BRANCH_BIAS:
            branch_bias_sum += df
    out = partial + program.to(tl.int64) * 4 * d + columns
    if SUM_OMEGA:
        tl.store(out, tl.sum(omega_sum, axis=0), mask=columns < d)
    if SUM_AFFINE:
        tl.store(out + d, tl.sum(weight_sum, axis=0), mask=columns < d)
        tl.store(out + 2 * d, tl.sum(bias_sum, axis=0), mask=columns < d)
    if SUM_BRANCH_BIAS:
        tl.store(out + 3 * d, tl.sum(branch_bias_sum, axis=0), mask=columns < d)


@triton.jit
def _sum_programs(gradient, partial, programs, columns, d, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    if gradient is not None:
        sums = tl.zeros((PROGRAMS, COLUMNS), tl.float32)
        for first in range(0, programs, PROGRAMS):
            rows = first + tl.arange(0, PROGRAMS)
            mask = (rows < programs)[:, None] & (columns < d)[None, :]
            sums += tl.load(partial + rows.to(tl.int64)[:, None] * 4 * d + columns[None, :], mask, other=0.0)
        tl.store(gradient + columns, tl.sum(sums, axis=0), mask=columns < d)


# Programs' partial sums of one parameter added up, a block of columns a program.
@triton.jit
def _reduce_kernel(
    grad_omega, grad_weight, grad_bias, grad_branch_bias, partial, programs, d,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    parameter = tl.program_id(1)
    if parameter == 0:
        _sum_programs(grad_omega, partial, programs, columns, d, PROGRAMS, COLUMNS)
    elif parameter == 1:
        _sum_programs(grad_weight, partial + d, programs, columns, d, PROGRAMS, COLUMNS)
    elif parameter == 2:
        _sum_programs(grad_bias, partial + 2 * d, programs, columns, d, PROGRAMS, COLUMNS)
    else:
        _sum_programs(grad_branch_bias, partial + 3 * d, programs, columns, d, PROGRAMS, COLUMNS)


def forward(residual: Residual, affine: Affine, dropout: Dropout, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, d), μ (N,) and 1/σ (N,)."""
    x, branch, omega, branch_bias = residual
    seed, p = dropout
    n, d = x.shape
    y, mean, rstd = x.new_empty(n, d), *(x.new_empty(n, dtype=torch.float32) for _ in range(2))
    arguments = (
        y, mean, rstd, x, branch, omega, *affine, branch_bias, seed,
        n, d, x.stride(0), branch.stride(0), p, 1 / (1 - p), norm.eps,
    )  # fmt: skip
    if d > _FORWARD_WHOLE:
        if n > 0:
            _long_forward_kernel[(n,)](*arguments, CENTER=norm.center, COLUMNS=_CHUNK, num_warps=_CHUNK // 256)
        return y, mean, rstd
    tile = choose("admin_norm.forward", _tiles(_FORWARD, d), x, n=n, d=d)
    _forward_kernel[(_programs(x, tile, n),)](
        *arguments, CENTER=norm.center, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps
    )
    return y, mean, rstd


def backward(wanted: Wanted, grad_y: Tensor, saved: Saved, dropout: Dropout, *, center: bool) -> Gradients:
    """One kernel over rows (two for long ones) and a small reduction."""
    *inputs, mean, rstd = saved
    x, branch, p = saved.x, saved.branch, dropout.p
    n, d = grad_y.shape
    grad_x, grad_branch = torch.empty_like(grad_y), torch.empty_like(grad_y) if wanted.branch else None
    parameters = [rstd.new_empty(d) if make else None for make in wanted[1:]]
    whole = d <= _BACKWARD_WHOLE
    tiles = _tiles(_BACKWARD, d if whole else _SPLIT_COLUMNS)
    tile = choose("admin_norm.backward", tiles, grad_y, n=n, d=d)
    column_blocks = triton.cdiv(d, tile.columns)
    programs = triton.cdiv(_programs(grad_y, tile, n * column_blocks), column_blocks)
    partial = rstd.new_empty(programs, 4, d)
    means = None if whole else rstd.new_empty(n, 2)
    arguments = (grad_y, *inputs, dropout.seed, mean, rstd, n, d, _stride(x), _stride(branch), p, 1 / (1 - p))
    if means is not None and n > 0:
        _means_kernel[(n,)](means, *arguments, COLUMNS=_CHUNK, num_warps=_CHUNK // 256)
    _backward_kernel[(programs, column_blocks)](
        grad_x, grad_branch, partial, means, *arguments, CENTER=center, WHOLE=whole,
        SUM_OMEGA=wanted.omega, SUM_AFFINE=wanted.weight or wanted.bias, SUM_BRANCH_BIAS=wanted.branch_bias,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    if any(wanted[1:]):
        _reduce_kernel[(triton.cdiv(d, _REDUCE_COLUMNS), 4)](
            *parameters, partial, programs, d, PROGRAMS=_REDUCE_PROGRAMS, COLUMNS=_REDUCE_COLUMNS
        )
    grad_omega, grad_weight, grad_bias, grad_branch_bias = [
        rstd.new_empty(0) if gradient is None else gradient for gradient in parameters
    ]
    grad_branch = grad_y.new_empty(0) if grad_branch is None else grad_branch
    return grad_x, grad_branch, grad_omega, grad_weight, grad_bias, grad_branch_bias


def _tiles(table: Sequence[tuple[int, int]], d: int) -> list[RowTile]:
    """Four warps or more a program, 16 at most: the longest rows have more values a thread instead."""
    columns = max(4, triton.next_power_of_2(d))
    tiles = []
    for values, warps in table:
        num_warps = min(16, max(4, columns // (32 * values)))
        tiles.append(RowTile(max(1, 128 * values // columns), columns, num_warps, max(1, warps // num_warps)))
    return tiles


def _programs(like: Tensor, tile: RowTile, rows: int) -> int:
    return max(1, min(triton.cdiv(rows, tile.rows), persistent_programs(like, tile.programs)))


def _stride(tensor: Tensor | None) -> int:
    return 1 if tensor is None else tensor.stride(0)
