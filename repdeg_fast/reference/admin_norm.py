"""ADMIN's residual block (arXiv 2004.08249, section 4; arXiv 2008.07772): scaled residual sum, then normalization.

    z = x ⊙ ω + dropout(f + b),    n = (z − μ)·r,    y = n ⊙ γ + β

a row at a time, with μ = mean(z) and r = 1/√(mean((z − μ)²) + eps); for RMSNorm (``center=False``) μ is 0. With
k = 1/(1−p) where dropout keeps a value and 0 where it drops one, g = dy ⊙ γ, c₁ = mean(g) (0 for RMSNorm) and
c₂ = mean(g ⊙ n), the gradients are

    dz = r (g − c₁ − c₂ n),    dx = dz ⊙ ω,    df = dz ⊙ k
    dω = Σ dz ⊙ x,    dγ = Σ dy ⊙ n,    dβ = Σ dy,    db = Σ df        (sums over rows)

n comes from the output, as (y − β)/γ, or from the inputs; k is drawn again from the seed. Nothing else need be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast.reference.cosreg import arithmetic_dtype
from repdeg_fast.reference.philox import dropout_mask


def admin_norm(
    x: Tensor,
    branch: Tensor,
    omega: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "layer",
) -> Tensor:
    """The definition, differentiable by autograd: for tests. ``keep``: k above, in the shape of ``x``."""
    dtype = arithmetic_dtype(x)
    z = _residual_sum(x.to(dtype), branch.to(dtype), omega, branch_bias, keep)
    centered = z - z.mean(-1, keepdim=True) if norm == "layer" else z
    normalized = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return _affine(normalized, weight, bias).to(x.dtype)


def eager_form(
    x: Tensor,
    branch: Tensor,
    omega: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """What a careful user writes today with LayerNorm, and what ``torch.compile`` gets in the benchmarks."""
    scaled = x if omega is None else x * omega.to(x.dtype)
    z = scaled + torch.nn.functional.dropout(branch, dropout)
    dtype = arithmetic_dtype(z) if weight is None else weight.dtype
    return torch.nn.functional.layer_norm(z.to(dtype), z.shape[-1:], weight, bias, eps).to(x.dtype)


def forward(
    x: Tensor,
    branch: Tensor,
    omega: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, d) in the dtype of ``x``, μ (N,) and r (N,) in fp32 (float64 for float64)."""
    dtype = arithmetic_dtype(x)
    z = _residual_sum(x.to(dtype), branch.to(dtype), omega, branch_bias, _keep(seed, x, dropout))
    mean = z.mean(1) if center else z.new_zeros(len(z))
    centered = z - mean[:, None]
    rstd = (centered.square().mean(1) + eps).rsqrt()
    return _affine(centered * rstd[:, None], weight, bias).to(x.dtype), mean, rstd


def backward(
    grad_x: Tensor,
    grad_branch: Tensor | None,
    grad_omega: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_branch_bias: Tensor | None,
    grad_y: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    omega: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout: float,
    center: bool,
) -> None:
    """Write the gradients asked for. n is made from ``y`` where given, else from ``x``, ``branch`` and ``mean``.

    A column with γ = 0 takes n from ``y`` as 0.
    """
    dtype = rstd.dtype
    keep = _keep(seed, grad_y, dropout)
    if y is None:
        assert x is not None
        assert branch is not None
        assert mean is not None
        z = _residual_sum(x.to(dtype), branch.to(dtype), omega, branch_bias, keep)
        n = (z - mean[:, None]) * rstd[:, None]
    else:
        n = y.to(dtype) if bias is None else y.to(dtype) - bias
        n = n if weight is None else torch.where(weight == 0, 0, n / weight)
    dy = grad_y.to(dtype)
    g = dy if weight is None else dy * weight
    c1 = g.mean(1, keepdim=True) if center else 0
    dz = rstd[:, None] * (g - c1 - (g * n).mean(1, keepdim=True) * n)
    df = dz if keep is None else dz * keep
    grad_x.copy_(dz if omega is None else dz * omega)
    if grad_branch is not None:
        grad_branch.copy_(df)
    if grad_omega is not None:
        assert x is not None
        torch.sum(dz * x.to(dtype), 0, out=grad_omega)
    for gradient, terms in ((grad_weight, dy * n), (grad_bias, dy), (grad_branch_bias, df)):
        if gradient is not None:
            torch.sum(terms, 0, out=gradient)


def _residual_sum(
    x: Tensor, branch: Tensor, omega: Tensor | None, branch_bias: Tensor | None, keep: Tensor | None
) -> Tensor:
    branch = branch if branch_bias is None else branch + branch_bias
    branch = branch if keep is None else branch * keep
    return (x if omega is None else x * omega) + branch


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normalized = normalized if weight is None else normalized * weight
    return normalized if bias is None else normalized + bias


def _keep(seed: Tensor | None, like: Tensor, dropout: float) -> Tensor | None:
    """1/(1−p) where dropout keeps a value, else 0: (N, d) in the arithmetic dtype; ``None`` without dropout."""
    if seed is None:
        return None
    mask = dropout_mask(seed, range(like.shape[0]), range(like.shape[1]), dropout)
    return mask.to(arithmetic_dtype(like)) / (1 - dropout)
