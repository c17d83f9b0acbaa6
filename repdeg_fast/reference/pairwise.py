"""Means over pairs of cosines, and each row's maximum.

With û = x/max(‖x‖, eps), c_ij = û_i·v̂_j and P pairs (i, j) — the N(N − 1) with i ≠ j of one set, all N·M of two, or
those with i ≠ j — the measures are

    (1/P) Σ φ(c_ij),   φ(c) = c, c², |c| or max(c − margin, 0),        and   log (1/P) Σ exp(c_ij/T).

A pair with a zero row adds nothing to a sum, but keeps its place among the P, as in CosReg, and a zero row gets no
gradient. Through the normalization, with G_i = Σ_j φ'(c_ij) v̂_j for what the sum says of û_i,

    ∂/∂x_i = (G_i − (G_i·û_i) û_i)/‖x_i‖,        or G_i/eps for a row shorter than eps.

c and c² have closed forms in the sums s = Σ û and A = Σ û ûᵀ, the latter in O(N·d²):

    Σ_ij c_ij = s·t,   G_i = t,        Σ_ij c_ij² = ⟨A, B⟩,   G_i = 2 B û_i

from all of which the pairs (i, i) are taken. The functions of one set depend on x twice, hence twice these G.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.contracts.pairwise import Block, Kind, LeftOut, Rule

_CHUNK = 1024  # rows that are normalized at a time for the closed forms


def pairwise_cosine(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kind: str,
    margin: float = 0.0,
    temperature: float = 0.25,
    skip_diagonal: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """The definition, O(N·M) memory: for tests and benchmarks."""
    cosines, counted, pairs = _matrix(x, y, skip_diagonal, eps)
    if kind == "logmeanexp":
        terms = (cosines / temperature).masked_fill(~counted, -math.inf)
        return terms.flatten().logsumexp(0) - math.log(pairs) if counted.any() else 0 * cosines.sum()
    phi = {"mean": cosines, "square": cosines**2, "abs": cosines.abs(), "relu": (cosines - margin).relu()}[kind]
    return phi.masked_fill(~counted, 0).sum() / max(pairs, 1)


def pairwise_max_cosine(
    x: Tensor, y: Tensor | None = None, *, skip_diagonal: bool = False, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """The definition, O(N·M) memory."""
    cosines, counted, _ = _matrix(x, y, skip_diagonal, eps)
    values, index = cosines.masked_fill(~counted, -math.inf).max(dim=1)
    return values.masked_fill(~counted.any(1), 0), index.masked_fill(~counted.any(1), -1)


def count_pairs(n: int, m: int | None, skip_diagonal: bool) -> int:
    """P of n rows with m others, or among themselves."""
    if m is None:
        return n * (n - 1)
    return n * m - min(n, m) * skip_diagonal


def _matrix(x: Tensor, y: Tensor | None, skip_diagonal: bool, eps: float) -> tuple[Tensor, Tensor, int]:
    """All cosines, which of them count, and P."""
    left = right = _unit(x, eps)
    if y is not None:
        right = _unit(y, eps)
    cosines = left @ right.T
    counted = (left != 0).any(1)[:, None] & (right != 0).any(1)
    if y is None or skip_diagonal:
        counted = counted & ~torch.eye(*cosines.shape, dtype=torch.bool, device=x.device)
    return cosines, counted, count_pairs(len(x), None if y is None else len(y), skip_diagonal)


def _unit(x: Tensor, eps: float) -> Tensor:
    x = x.to(arithmetic_dtype(x))
    zero = (x == 0).all(1, keepdim=True)
    return torch.nn.functional.normalize(torch.where(zero, 1.0, x), dim=1, eps=eps).masked_fill(zero, 0)


class Set(NamedTuple):
    """One set of vectors, what normalizes them, and the sum of û (d,) or of û ûᵀ (d, d)."""

    rows: Tensor  # (N, d)
    inverse: Tensor  # (N,): 1/max(‖x‖, eps), 0 for zero rows
    moment: Tensor

    def units(self, length: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The û of the first ``length`` rows, some at a time, in memory that the next ones take over."""
        n = len(self.rows) if length is None else length
        memory = self.inverse.new_empty(min(n, _CHUNK), self.rows.shape[1])
        for first in range(0, n, _CHUNK):
            chunk = slice(first, min(first + _CHUNK, n))
            unit = memory[: chunk.stop - first]
            yield chunk, torch.mul(self.rows[chunk], self.inverse[chunk, None], out=unit)


def second_moment(rows: Tensor, inverse: Tensor) -> Tensor:
    """Σ û ûᵀ (d, d)."""
    total = inverse.new_zeros(rows.shape[1], rows.shape[1])
    for _, unit in Set(rows, inverse, total).units():
        total.addmm_(unit.T, unit)
    return total


def moment_mean(x: Set, y: Set | None, skip_diagonal: bool) -> Tensor:
    """(1/P) Σ c, or c² where the moments are second ones. Added up in double: what is taken from the sum may be most
    of it."""
    other, power = x if y is None else y, x.moment.dim()
    total = (x.moment.double() * other.moment.double()).sum()
    if y is None or skip_diagonal:
        paired = min(len(x.rows), len(other.rows))
        for (_, unit), (_, partner) in zip(x.units(paired), other.units(paired), strict=True):
            total -= torch.linalg.vecdot(unit, partner).double().pow(power).sum()
    pairs = count_pairs(len(x.rows), None if y is None else len(y.rows), skip_diagonal)
    return (total / max(pairs, 1)).to(x.moment.dtype)


def moment_gradient(
    grad_rows: Tensor, grad_value: Tensor, x: Set, y: Set | None, skip_diagonal: bool, eps: float
) -> None:
    """Write grad_value · ∂/∂x of :func:`moment_mean` over ``grad_rows`` (N, d)."""
    n, other, power = len(x.rows), x if y is None else y, x.moment.dim()
    pairs = count_pairs(n, None if y is None else len(y.rows), skip_diagonal)
    scale = grad_value * (power * (2 if y is None else 1) / max(pairs, 1))
    partners = other.units(min(n, len(other.rows))) if y is None or skip_diagonal else iter(())
    memory = x.inverse.new_empty(min(n, _CHUNK), x.rows.shape[1])
    for chunk, unit in x.units():
        gradient = memory[: len(unit)]
        torch.mm(unit, other.moment, out=gradient) if power == 2 else gradient.copy_(other.moment.expand_as(unit))
        for _, partner in itertools.islice(partners, 1):
            own = torch.linalg.vecdot(unit[: len(partner)], partner) ** (power - 1)
            gradient[: len(partner)].addcmul_(own[:, None], partner, value=-1)
        project_(gradient, unit, x.inverse[chunk], eps)
        torch.mul(gradient, scale, out=grad_rows[chunk])


def max_gradients(
    grad_values: Tensor, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor] | None, index: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Σ grad_values · ∂/∂x and ∂/∂y of the rows' maxima, of rows and their inverse norms, in the arithmetic dtype."""
    left, right = x[0] * x[1][:, None], None if y is None else y[0] * y[1][:, None]
    others = left if right is None else right
    scale, nearest = grad_values.masked_fill(index < 0, 0)[:, None], index.clamp_min(0)
    of_left = others[nearest].mul_(scale)
    # what rows say of the same nearest is added up in order, on every device
    of_right = torch.ops.aten.embedding_dense_backward(left * scale, nearest, len(others), -1, False)
    if right is None or y is None:
        project_(of_left.add_(of_right), left, x[1], eps)
        return of_left, None
    project_(of_left, left, x[1], eps)
    project_(of_right, right, y[1], eps)
    return of_left, of_right


def project_(gradient: Tensor, unit: Tensor, inverse: Tensor, eps: float) -> None:
    """G_i, what a function's derivative says of û_i, to the derivative by x_i, in place."""
    along = torch.linalg.vecdot(gradient, unit)
    along = torch.where(inverse < 1 / eps, along, 0)  # where eps is what divides, û is linear in x
    gradient.addcmul_(unit, along[:, None], value=-1).mul_(inverse[:, None])


def measure(block: Block, rule: Rule, sums: Tensor, *, slopes: bool) -> None:
    """See the contract."""
    cosines = block.cosines.to(sums.dtype)
    left_out = _left_out(block)
    if rule.kind == Kind.SQUARE:
        value, slope = cosines**2, 2 * cosines
    elif rule.kind == Kind.ABS:
        value, slope = cosines.abs(), torch.where(cosines == 0, cosines, cosines / cosines.abs())
    elif rule.kind == Kind.RELU:
        value = (cosines - rule.parameter).relu()
        slope = torch.where(value > 0, 1, value)
    else:
        value = slope = (rule.parameter * cosines - rule.origin).exp()
    kept = (block.keep_rows != 0)[:, None] & (block.keep_columns != 0)  # else 0, or NaN where the other vector is
    torch.sum(torch.where(kept, value, cosines).masked_fill(left_out, 0), dim=1, out=sums)
    if slopes:
        block.cosines.copy_(torch.where(kept, slope, cosines).masked_fill(left_out, 0))


def maxima(block: Block, values: Tensor, index: Tensor) -> None:
    """See the contract."""
    cosines = block.cosines.to(values.dtype)
    masked = cosines.masked_fill(_left_out(block) | (block.keep_columns == 0), -math.inf)
    torch.max(masked, dim=1, out=(values, index))
    none = values == -math.inf
    values.masked_fill_(none, 0)
    index.masked_fill_(none, -1)


def _left_out(block: Block) -> Tensor:
    rows, columns = block.cosines.shape
    own = block.diagonal + torch.arange(rows, device=block.cosines.device)[:, None]
    column = torch.arange(columns, device=own.device)
    if block.left_out == LeftOut.OWN:
        return column == own
    return (column <= own) & (block.left_out == LeftOut.LOWER)
