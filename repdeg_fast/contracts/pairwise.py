"""The contract of the measures over pairs. Mathematics: :mod:`repdeg_fast.reference.pairwise`.

A backend knows one block of cosines at a time; :mod:`repdeg_fast.ops.pairwise_blocks` has the products around it. The
closed forms need no kernel but CosReg's.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol

from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Products


class Kind(IntEnum):
    """φ, by the number that the kernels know it by."""

    SQUARE = 0
    ABS = 1
    RELU = 2
    EXP = 3


class LeftOut(IntEnum):
    """Which pairs of a block do not count."""

    NOTHING = 0
    OWN = 1  # of a row with itself
    LOWER = 2  # that, and all before it: each unordered pair once


class Vectors(NamedTuple):
    """What is compared: all rows of x with all of y, or of x itself."""

    x: Tensor  # (N, d)
    y: Tensor | None  # (M, d)
    skip_diagonal: bool  # of pairs (i, i); always where y is None
    eps: float


class Rule(NamedTuple):
    """φ(c) = c², |c|, max(c − parameter, 0) or exp(parameter·c − origin)."""

    kind: Kind
    parameter: float  # margin, or 1/T
    origin: Tensor  # (), in the arithmetic dtype


class Block(NamedTuple):
    """Cosines of R rows with W columns, contiguous along their rows."""

    cosines: Tensor  # (R, W)
    keep_rows: Tensor  # (R,), in the arithmetic dtype: 1, but 0 for a zero row, whose pairs do not count
    keep_columns: Tensor  # (W,)
    diagonal: int  # row r is the same as column diagonal + r
    left_out: LeftOut


class RowKernels(Products, Protocol):
    """The row kernels of a backend, and its way with the products around them."""

    def measure(self, block: Block, rule: Rule, sums: Tensor, *, slopes: bool) -> None:
        """Σ_j φ(c_rj) of each row into ``sums`` (R,). With ``slopes`` c_rj becomes φ'(c_rj), but for a factor 1/T of
        the exponential, and 0 where a pair is left out. Cosines with a zero vector are 0, or NaN if the other vector is
        not a number, and stay that in place of φ and φ'."""

    def maxima(self, block: Block, values: Tensor, index: Tensor) -> None:
        """The largest cosine of each row (R,) and its column, int64, the first of several; 0 and −1 without any. NaN
        is larger than all else."""
