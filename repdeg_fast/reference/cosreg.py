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


def forward(weight: Tensor, row_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R (), s (d,), 1/max(‖w_i‖, eps) (N,; 0 for zero rows) and P (), in fp32 (float64 for float64)."""
    rows = weight.to(arithmetic_dtype(weight))
    p = rows.new_ones(len(rows)) if row_weight is None else row_weight
    norm = rows.norm(dim=1)
    inverse_norm = torch.where(norm == 0, 0, 1 / norm.clamp_min(eps))
    inverse_norm = inverse_norm.masked_fill(norm.isinf(), float("nan"))  # an overflow must not look like a zero row
    coefficients = (p * inverse_norm).split(_CHUNK)
    parts = [c @ x for c, x in zip(coefficients, rows.split(_CHUNK), strict=True)]
    column_sum = torch.stack(parts).double().sum(dim=0).to(rows.dtype)
    self_similarity = torch.where(norm == 0, 0, (norm / eps).clamp_max(1)) ** 2
    total_weight = p.sum()
    value = (column_sum.double().square().sum() - (p * p * self_similarity).double().sum()) / total_weight**2
    return value.to(rows.dtype), column_sum, inverse_norm, total_weight


def backward(
    grad_weight: Tensor,
    grad_value: Tensor,
    weight: Tensor,
    row_weight: Tensor | None,
    column_sum: Tensor,
    inverse_norm: Tensor,
    total_weight: Tensor | None,
    eps: float,
    accumulate: bool,
) -> None:
    """Write grad_value · ∂R/∂W over ``grad_weight``, or add it where ``accumulate``. ``total_weight=None`` means N."""
    rows = weight.to(column_sum.dtype)
    p = inverse_norm.new_ones(()) if row_weight is None else row_weight
    total = len(rows) if total_weight is None else total_weight
    direction = inverse_norm[:, None] * rows
    along = torch.where(inverse_norm < 1 / eps, direction @ column_sum, p)
    scale = (2 * grad_value / total**2) * p * inverse_norm
    gradient = scale[:, None] * (column_sum - along[:, None] * direction)
    grad_weight.copy_(grad_weight + gradient if accumulate else gradient)


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for everything but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
