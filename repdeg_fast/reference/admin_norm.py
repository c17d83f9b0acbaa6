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

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.contracts.admin_norm import Affine, Dropout, Gradients, Norm, Residual, Saved, Wanted
from repdeg_fast.reference._blocks import block_size, cut
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


def forward(residual: Residual, affine: Affine, dropout: Dropout, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract."""
    x, branch, omega, branch_bias = residual
    n, d = x.shape
    dtype = arithmetic_dtype(x)
    y = x.new_empty(n, d)
    mean, rstd = x.new_zeros(n, dtype=dtype), x.new_empty(n, dtype=dtype)
    keep = _keep(dropout, x)
    for rows in _blocks(x):
        z = _residual_sum(x[rows].to(dtype), branch[rows].to(dtype), omega, branch_bias, keep(rows))
        if norm.center:
            y[rows], mean[rows, None], rstd[rows, None] = torch.native_layer_norm(z, [d], *affine, norm.eps)
        else:
            rstd[rows] = (z.square().mean(1) + norm.eps).rsqrt()
            y[rows] = _affine(z.mul_(rstd[rows, None]), *affine)
    return y, mean, rstd


def empty_gradients(wanted: Wanted, grad_y: Tensor, rstd: Tensor) -> Gradients:
    """In the arithmetic dtype, which is that of ``rstd``, for the parameters."""
    d = grad_y.shape[1]
    branch = torch.empty_like(grad_y) if wanted.branch else grad_y.new_empty(0)
    omega, weight, bias, branch_bias = [rstd.new_empty(d if make else 0) for make in wanted[1:]]
    return torch.empty_like(grad_y), branch, omega, weight, bias, branch_bias


def backward(wanted: Wanted, grad_y: Tensor, saved: Saved, dropout: Dropout, *, center: bool) -> Gradients:
    """A column with γ = 0 takes n from ``y`` as 0."""
    y, x, branch, omega, weight, bias, branch_bias, mean, rstd = saved
    gradients = empty_gradients(wanted, grad_y, rstd)
    grad_x, grad_branch, *parameters = gradients
    dtype = rstd.dtype
    inverse_weight = None if weight is None else weight.reciprocal().masked_fill_(weight == 0, 0)
    keep = _keep(dropout, grad_y)
    blocks = list(_blocks(grad_y))
    partial = rstd.new_zeros(len(parameters), len(blocks), grad_y.shape[1])
    for block, rows in enumerate(blocks):
        k, r = keep(rows), rstd[rows, None]
        x_rows = None if x is None else x[rows].to(dtype)
        if y is None:
            assert x_rows is not None
            assert branch is not None
            assert mean is not None
            n = (_residual_sum(x_rows, branch[rows].to(dtype), omega, branch_bias, k) - mean[rows, None]) * r
        else:
            n = y[rows].to(dtype) if bias is None else y[rows].to(dtype) - bias
            n = n if inverse_weight is None else n * inverse_weight
        dy = grad_y[rows].to(dtype)
        g = dy if weight is None else dy * weight
        c2 = (g * n).mean(1, keepdim=True)
        g = g - g.mean(1, keepdim=True) if center else g
        dz = r * (g - c2 * n)
        df = dz if k is None else dz * k
        grad_x[rows] = dz if omega is None else dz * omega
        if wanted.branch:
            grad_branch[rows] = df
        for make, sums, (a, b) in zip(
            wanted[1:], partial[:, block], ((dz, x_rows), (dy, n), (dy, None), (df, None)), strict=True
        ):
            if make:
                torch.sum(a if b is None else a * b, 0, out=sums)
    for make, gradient, sums in zip(wanted[1:], parameters, partial, strict=True):
        if make:
            torch.sum(sums, 0, out=gradient)
    return gradients


def _blocks(matrix: Tensor) -> Iterator[slice]:
    rows, d = matrix.shape
    return (slice(block.start, block.stop) for block in cut(range(rows), block_size(matrix.device) // d))


def _residual_sum(
    x: Tensor, branch: Tensor, omega: Tensor | None, branch_bias: Tensor | None, keep: Tensor | None
) -> Tensor:
    branch = branch if branch_bias is None else branch + branch_bias
    branch = branch if keep is None else branch * keep
    return (x if omega is None else x * omega) + branch


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normalized = normalized if weight is None else normalized * weight
    return normalized if bias is None else normalized + bias


def _keep(dropout: Dropout, like: Tensor) -> Callable[[slice], Tensor | None]:
    """Of some rows: 1/(1−p) where dropout keeps a value, else 0, in the arithmetic dtype; ``None`` without dropout."""
    seed, p = dropout
    if seed is None:
        return lambda rows: None
    mask = dropout_mask(seed, range(like.shape[0]), range(like.shape[1]), p)
    return lambda rows: mask[rows].to(arithmetic_dtype(like)).mul_(1 / (1 - p))
