"""Measures over pairs as the library's products around a backend's row kernel, on one reused buffer of cosines.

The unit rows are made once, in the dtype of the products; their inverse norms come from CosReg's forward pass. A chunk
of rows meets all columns: C = Û_I V̂ᵀ into the buffer, the row kernel sums φ and turns C to φ'(C) in place, and two
products more give what it says of û and v̂. That is made in the forward pass, since C would have to be made again later:
what is saved is the gradient, for the one upstream value to scale.

Of one set each unordered pair is met once: columns start where the rows do, and the row kernel leaves out what lies
below the diagonal. Half the products, and in both directions.

exp(c/T − origin) must not leave fp32's range. Cosines lie in [−1, 1], so 1/T will do as the origin unless T is so small
that the smallest of the exponentials vanishes; then the largest cosine is looked for first, a product more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast.contracts.cosreg import Rows, Sums
from repdeg_fast.contracts.pairwise import Block, Kind, LeftOut, RowKernels, Rule, Vectors
from repdeg_fast.ops import buffers, cosreg
from repdeg_fast.ops.chunked_logits import FEWEST_ROWS, THREAD_SUMS, TILE
from repdeg_fast.ops.products import Sum, operand_dtype
from repdeg_fast.reference.pairwise import count_pairs, project_

ROWS = 512  # of a chunk, at least
PIECES = 16  # chunks of one set: a 16th of the products is for pairs that are met twice


class Unit(NamedTuple):
    """One set of vectors, normalized."""

    x: Tensor  # (N, d)
    rows: Tensor  # (N, d), in the dtype of the products
    inverse: Tensor  # (N,): 1/max(‖x‖, eps), 0 for zero rows
    keep: Tensor  # (N,): 1, 0 for zero rows

    @classmethod
    def of(cls, x: Tensor, eps: float, backend: str) -> Unit:
        inverse = norms(x, eps, backend).inverse_norm
        rows = torch.empty(x.shape, dtype=product_dtype(x), device=x.device)
        torch.mul(x, inverse[:, None], out=rows)
        return cls(x, rows, inverse, (inverse != 0).to(inverse.dtype))


def norms(x: Tensor, eps: float, backend: str) -> Sums:
    """CosReg's forward pass: Σ û and the inverse norms."""
    return Sums(*cosreg.operation.kernels(backend, x).forward(Rows(x, None, eps)))


def product_dtype(x: Tensor) -> torch.dtype:
    """That of x where the device is fast at it; fp32 for fp16, in which the smaller exponentials would be lost."""
    return torch.float32 if x.dtype == torch.float16 else operand_dtype(x)


class Blocks:
    """Two sets, or one with itself, and how they meet."""

    def __init__(self, kernels: RowKernels, vectors: Vectors, backend: str) -> None:
        x, y, skip_diagonal, self.eps = vectors
        self.kernels, self.symmetric = kernels, y is None
        self.pairs = count_pairs(len(x), None if y is None else len(y), skip_diagonal)
        self.left = Unit.of(x, self.eps, backend)
        self.right = self.left if y is None else Unit.of(y, self.eps, backend)
        self.own = LeftOut.OWN if y is None or skip_diagonal else LeftOut.NOTHING

    def measure(self, kind: Kind, parameter: float, needs: list[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The mean of φ, or log-mean-exp, and the needed gradients by x and y, in the arithmetic dtype."""
        left, right, twice = self.left, self.right, 2 if self.symmetric else 1
        rule = Rule(kind, parameter, self._origin(parameter) if kind == Kind.EXP else left.inverse.new_zeros(()))
        sums = left.inverse.new_empty(len(left.rows))
        gradients = [
            one.inverse.new_zeros(one.rows.shape) if need else None
            for one, need in zip((left, right), needs, strict=True)
        ]
        of_left, of_right = gradients[0], gradients[0] if self.symmetric else gradients[1]
        for rows, block in self._blocks(LeftOut.LOWER if self.symmetric else self.own, upper=self.symmetric):
            columns = slice(rows.start if self.symmetric else 0, None)
            self.kernels.measure(block, rule, sums[rows], slopes=True in needs)
            if of_left is not None:
                self._add(of_left[rows], block.cosines, right.rows[columns])
            if of_right is not None:
                self._add(of_right[columns], block.cosines.t(), left.rows[rows])
        total = sums.sum(dtype=torch.float64) * twice
        value, scale = total / max(self.pairs, 1), torch.full_like(total, twice / max(self.pairs, 1))
        if kind == Kind.EXP:  # without any pair: 0
            value = torch.where(total == 0, 0, value.log() + rule.origin)
            scale = torch.where(total == 0, 0, twice * parameter / total)
        for one, gradient in zip((left, right), gradients, strict=True):
            if gradient is not None:
                self._finish(gradient, one, scale.to(gradient.dtype))
        return value.to(sums.dtype), gradients[0], gradients[1]

    def maxima(self) -> tuple[Tensor, Tensor]:
        """The largest cosine of each row and its column; 0 and −1 without any."""
        left, right = self.left, self.right
        values = left.inverse.new_empty(len(left.rows))
        index = torch.empty(len(left.rows), dtype=torch.int64, device=values.device)
        for rows, block in self._blocks(self.own):
            self.kernels.maxima(block, values[rows], index[rows])
        if left.rows.dtype != values.dtype:  # 16-bit cosines: good enough to choose by
            nearest = index.clamp_min(0)
            exact = torch.linalg.vecdot(left.x * left.inverse[:, None], right.x[nearest] * right.inverse[nearest, None])
            values = torch.where(index < 0, values, exact)
        nothing = left.keep == 0
        return values.masked_fill_(nothing, 0), index.masked_fill_(nothing, -1)

    def _blocks(self, left_out: LeftOut, upper: bool = False) -> Iterator[tuple[slice, Block]]:
        """The cosines of some rows at a time with all columns, or with those from the rows' own on."""
        left, right, dtype = self.left, self.right, self.left.rows.dtype
        n, m = len(left.rows), len(right.rows)
        row_bytes = buffers.aligned(m, dtype) * dtype.itemsize
        most = max((buffers.limit(left.rows) - THREAD_SUMS) // row_bytes, FEWEST_ROWS)
        step = min(n, most, max(ROWS, -(-n // PIECES)))
        memory = buffers.take(self.kernels, left.rows, step, m, dtype)
        for first, last in buffers.ranges(n, step):
            begin = first if upper else 0
            cosines = buffers.matrix(left.rows, last - first, m - begin, dtype, memory)
            self.kernels.multiply(cosines, left.rows[first:last], right.rows[begin:].t(), False)
            yield (
                slice(first, last),
                Block(cosines, left.keep[first:last], right.keep[begin:], first - begin, left_out),
            )
        buffers.keep(memory)

    def _origin(self, parameter: float) -> Tensor:
        zero = self.left.inverse.new_zeros(())
        if 2 * parameter <= -math.log(torch.finfo(self.left.rows.dtype).tiny):
            return zero + parameter
        values, index = self.maxima()
        largest = torch.where(index < 0, -math.inf, values).amax()
        return torch.where(largest == -math.inf, 0, largest) * parameter

    def _add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        Sum(self.kernels, total, total.dtype, 1).add(a, b, False)

    def _finish(self, gradient: Tensor, one: Unit, scale: Tensor) -> None:
        for first, last in buffers.ranges(len(gradient), TILE):
            chunk = slice(first, last)
            project_(gradient[chunk], one.x[chunk] * one.inverse[chunk, None], one.inverse[chunk], self.eps)
            gradient[chunk] *= scale
