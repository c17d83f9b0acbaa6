"""CosReg, cosine regularization against representation degeneration (arXiv 1907.12009, section 5).

With ŵ_i = w_i / max(‖w_i‖, eps), row weights p (1 unless given) and P = Σ p_i:

    R(W) = (1/P²) Σ_i Σ_{j≠i} p_i p_j ŵ_i·ŵ_j

:func:`cosine_regularization` is that definition, N×N matrix and all. The double sum is a square:
with s = Σ p_i ŵ_i,

    R = (‖s‖² − Σ p_i² ‖ŵ_i‖²) / P²,        ∂R/∂w_i = (2 p_i / P²) (s − (s·ŵ_i) ŵ_i) / ‖w_i‖

which :func:`forward` and :func:`backward` compute in O(N·d). ‖ŵ_i‖ is 1, except for a zero row, which contributes
nothing and gets a zero gradient, and for a row shorter than eps, where ŵ_i = w_i/eps is linear in w_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.contracts.cosreg import Rows, Saved, Sums

_CHUNK = 1024  # rows that are summed in fp32 before the sum goes on in double


def cosine_regularization(weight: Tensor, row_weight: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """The definition, O(N²·d) time and O(N²) memory: for tests and benchmarks."""
    weight = weight.to(arithmetic_dtype(weight))
    p = weight.new_ones(len(weight)) if row_weight is None else row_weight
    nonzero = (weight != 0).any(dim=1)
    unit = torch.nn.functional.normalize(weight[nonzero], dim=1, eps=eps)
    similarity = (p[nonzero, None] * p[nonzero]) * (unit @ unit.T)
    return (similarity.sum() - similarity.diagonal().sum()) / p.sum() ** 2


def closed_form(weight: Tensor, eps: float = 1e-12) -> Tensor:
    """R without row weights, differentiable by autograd: what a careful user writes today, and what
    ``torch.compile`` gets in the benchmarks."""
    unit = torch.nn.functional.normalize(weight.to(arithmetic_dtype(weight)), dim=1, eps=eps)
    return (unit.sum(0).square().sum() - unit.square().sum()) / len(weight) ** 2


def forward(rows: Rows) -> Sums:
    """Both in O(N·d): see the contract."""
    weight, row_weight, eps = rows
    x = weight.to(arithmetic_dtype(weight))
    p = x.new_ones(len(x)) if row_weight is None else row_weight
    norm = _norm(x)
    inverse_norm = torch.where(norm == 0, 0, 1 / norm.clamp_min(eps))
    coefficients = (p * inverse_norm).split(_CHUNK)
    parts = [c @ part for c, part in zip(coefficients, x.split(_CHUNK), strict=True)]
    column_sum = torch.stack(parts).double().sum(dim=0).to(x.dtype)
    self_similarity = torch.where(norm == 0, 0, (norm / eps).clamp_max(1)) ** 2
    total_weight = p.sum()
    value = (column_sum.double().square().sum() - (p * p * self_similarity).double().sum()) / total_weight**2
    return Sums(value.to(x.dtype), column_sum, inverse_norm, total_weight)


def backward(grad_weight: Tensor, grad_value: Tensor, rows: Rows, saved: Saved, *, accumulate: bool) -> None:
    """Write grad_value · ∂R/∂W over ``grad_weight``, or add it where ``accumulate``."""
    column_sum, inverse_norm, total_weight = saved
    x = rows.weight.to(column_sum.dtype)
    p = inverse_norm.new_ones(()) if rows.row_weight is None else rows.row_weight
    total = len(x) if total_weight is None else total_weight
    direction = inverse_norm[:, None] * x
    along = torch.where(inverse_norm < 1 / rows.eps, direction @ column_sum, p)
    scale = (2 * grad_value / total**2) * p * inverse_norm
    gradient = scale[:, None] * (column_sum - along[:, None] * direction)
    grad_weight.copy_(grad_weight + gradient if accumulate else gradient)


def _norm(x: Tensor) -> Tensor:
    """‖x_i‖; NaN where its square overflows, which must not look like a zero row. Squares of tiny values would be lost:
    they are taken of enlarged ones."""
    norm = x.norm(dim=1)
    norm = torch.where(norm < 2.0**-48, (x * 2.0**64).norm(dim=1) / 2.0**64, norm)
    return norm.masked_fill(norm.isinf(), float("nan"))
