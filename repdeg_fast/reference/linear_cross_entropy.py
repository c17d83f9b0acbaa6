"""Cross entropy of a linear layer, z = softcap(h Eᵀ + b), without keeping the (N, V) logits.

N rows of hidden states h, of which row r belongs to target x = target[r mod M]: K heads of M rows each share one
target vector (AMOS, arXiv 2204.03243, equation 4; K = 1 is the ordinary loss). With label smoothing ε and
y_v = (1 − ε)[v = x] + ε/V,

    lse = log Σ_v exp z_v,        ℓ = lse − Σ_v y_v z_v        (0 where x is ignore_index)

and, with upstream gradients g for ℓ and u for lse, p = exp(z − lse), softcap(a) = c·tanh(a/c):

    ∂/∂z_v = (g + u) p_v − g y_v,        ∂/∂(h Eᵀ + b) = ∂/∂z · (1 − (z/c)²)
    dh = dz E,        dE = dzᵀ h,        db = Σ_r dz

Every backend has the three functions below, and sums in fp32 (fp64 for doubles).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repdeg_fast.reference.cosreg import arithmetic_dtype

__all__ = ["arithmetic_dtype", "backward", "forward", "forward_backward"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden_states, weight and bias; None: not needed


def forward(
    hidden_states: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    target: Tensor,  # (M,), N a multiple of M
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    label_smoothing: float,
    softcap: float,  # 0: none
) -> tuple[Tensor, Tensor]:
    """ℓ and lse of every row, (N,) each. A target outside the vocabulary makes its rows NaN."""
    z = _logits(hidden_states, weight, bias, softcap)
    target, ignored, invalid = _rows_of_target(target, len(z), len(weight), ignore_index)
    log_p = z.log_softmax(dim=1)  # z − lse, as exact where z is far from zero as elsewhere
    loss = -(1 - label_smoothing) * log_p.gather(1, target[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(dim=1)
    return loss.masked_fill(invalid, float("nan")).masked_fill(ignored, 0), z.logsumexp(dim=1)


def backward(
    grad_loss: Tensor,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs: list[bool],  # which gradients to make
    accumulate_dtype: torch.dtype,
) -> Gradients:
    """The gradients of Σ g·ℓ + Σ u·lse, each in the dtype of what it belongs to."""
    z = _logits(hidden_states, weight, bias, softcap)
    target, ignored, invalid = _rows_of_target(target, len(z), len(weight), ignore_index)
    g = grad_loss.masked_fill(invalid, float("nan")).masked_fill(ignored, 0)[:, None]
    u = torch.zeros_like(g) if grad_lse is None else grad_lse[:, None]
    dz = (g + u) * z.softmax(dim=1) - g * label_smoothing / len(weight)
    dz.scatter_add_(1, target[:, None], -(1 - label_smoothing) * g)
    if softcap:
        dz = dz * (1 - (z / softcap) ** 2)
    dz.masked_fill_((g == 0) & (u == 0), 0)  # a row that does not count gives nothing, even where z is not a number
    return (
        (dz @ weight.to(z.dtype)).to(hidden_states.dtype) if needs[0] else None,
        (dz.T @ hidden_states.to(z.dtype)).to(weight.dtype) if needs[1] else None,
        dz.sum(dim=0).to(bias.dtype) if needs[2] and bias is not None else None,
    )


def forward_backward(
    grad_loss: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs: list[bool],
    accumulate_dtype: torch.dtype,
    heads: int = 1,
    sample: Callable[[Tensor, int], None] | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """ℓ, lse and the gradients of Σ g·ℓ in one call, where g is known beforehand. ``sample`` is shown the logits of
    the heads, (K, M, V) without the bias, and the first position they are of."""
    options = (ignore_index, label_smoothing, softcap)
    if sample is not None:
        sample(_logits(hidden_states, weight, None, 0.0).unflatten(0, (heads, -1)), 0)
    loss, lse = forward(hidden_states, weight, target, bias, *options)
    inputs = (hidden_states, weight, target, bias, lse)
    return loss, lse, backward(grad_loss, None, *inputs, *options, needs, accumulate_dtype)


def rescale_(
    gradients: list[Tensor | None],  # of Σ loss, from forward_backward
    grad_heads: Tensor,  # (K,)
    grad_loss: Tensor,  # (N,), what it means for the rows
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs: list[bool],
    accumulate_dtype: torch.dtype,
) -> None:
    """Turn the gradients into those of Σ grad_heads·loss: one scale if all heads have the same, else made again."""
    inputs, options = (hidden_states, weight, target, bias), (ignore_index, label_smoothing, softcap)
    again = lambda: forward_backward(grad_loss, *inputs, *options, needs, accumulate_dtype)[2]  # noqa: E731
    scale_or_repeat_(gradients, grad_heads, again)


def scale_or_repeat_(gradients: list[Tensor | None], grad_heads: Tensor, make_again: Callable[[], Gradients]) -> None:
    """What :func:`rescale_` does where the values of ``grad_heads`` may be looked at."""
    scale, *others = grad_heads.tolist()
    if all(other == scale for other in others):
        for gradient in gradients if scale != 1 else ():
            if gradient is not None:
                gradient.mul_(scale)
    else:
        for gradient, right in zip(gradients, make_again(), strict=True):
            if gradient is not None and right is not None:
                gradient.copy_(right)


def _logits(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """(N, V) in the arithmetic dtype."""
    dtype = arithmetic_dtype(hidden_states)
    z = hidden_states.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return softcap * torch.tanh(z / softcap) if softcap else z


def _rows_of_target(target: Tensor, rows: int, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """One index a row that is safe to gather with, and which rows are ignored and which invalid."""
    target = target.long().repeat(rows // max(len(target), 1))
    ignored = target == ignore_index
    invalid = ((target < 0) | (target >= vocabulary)) & ~ignored
    return target.masked_fill(ignored | invalid, 0), ignored, invalid
