"""Counter-based random numbers inside Triton kernels. Definition: ``repdeg_fast/reference/philox.py``.

A block of noise is made in registers: one Philox call gives the four words of four neighbouring columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

GUMBEL_STREAM = tl.constexpr(0)
DROPOUT_STREAM = tl.constexpr(1)


@triton.jit
def words(seed, rows, first_column, stream: tl.constexpr, COLUMNS: tl.constexpr):
    """uint32 [len(rows), COLUMNS] words of the given ``rows`` [n] and of COLUMNS columns from ``first_column`` on.

    ``seed`` is an int64 value (loaded from a pointer, so that a CUDA graph can replay another), ``first_column`` and
    COLUMNS are multiples of 4.
    """
    quads = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    row = rows.to(tl.uint32)[:, None] + tl.zeros_like(quads)
    zero = tl.zeros_like(row)
    a, b, c, d = tl.philox(seed, quads + zero, row, zero + stream, zero)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(row.shape[0], COLUMNS)


@triton.jit
def uniform(seed, rows, first_column, stream: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 [len(rows), COLUMNS] numbers in (0, 1); arguments as :func:`words`."""
    return _in_unit_interval(words(seed, rows, first_column, stream, COLUMNS))


@triton.jit
def _in_unit_interval(word):
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def gumbel(seed, rows, first_column, COLUMNS: tl.constexpr, stream: tl.constexpr = GUMBEL_STREAM):
    """fp32 [len(rows), COLUMNS] standard Gumbel noise; arguments as :func:`words`."""
    return gumbel_of(words(seed, rows, first_column, stream, COLUMNS))


@triton.jit
def gumbel_of(word):
    """fp32 standard Gumbel noise from words."""
    return -tl.log(-tl.log(_in_unit_interval(word)))


@triton.jit
def gumbel_at(seed, rows, columns, stream: tl.constexpr = GUMBEL_STREAM):
    """fp32 standard Gumbel noise of one of the ``columns`` of each of the ``rows``, of one shape."""
    row = rows.to(tl.uint32)
    zero = tl.zeros_like(row)
    a, b, c, d = tl.philox(seed, (columns // 4).to(tl.uint32), row, zero + stream, zero)
    lane = columns % 4
    return gumbel_of(tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)))


@triton.jit
def dropout_mask(seed, rows, first_column, p, COLUMNS: tl.constexpr, stream: tl.constexpr = DROPOUT_STREAM):
    """Boolean [len(rows), COLUMNS], true with probability 1 − ``p``: what dropout keeps; arguments as :func:`words`."""
    return uniform(seed, rows, first_column, stream, COLUMNS) >= p
