"""Sampling from a learned mixture of K language-model heads (AMOS, arXiv 2204.03243, section 3).

With mixture weights α = softmax(mixture logits), logits z = Σ_k α_k (E h^(k) + b), Gumbel noise g, temperature τ and an
embedding F:

    token x̂ = argmax_v (z_v + g_v),    y = softmax((z + g)/τ),    value F[x̂] (hard) or Σ_v y_v F[v] (soft)

:func:`gumbel_mix` is that definition, M×V matrices and all. Because logits are affine in h and Σ α = 1, the kernels mix
hidden states, h̄ = Σ_k α_k h^(k), and take one product z = E h̄ + b.

Gradients are those of the straight-through estimator: of the value F[x̂] with respect to F, of the soft value with
respect to α; hidden states, E and b get none. With r the upstream gradient:

    δ = Σ_v y_v (F[v]·r),    dz_v = y_v (F[v]·r − δ)/τ,
    dh̄ = Σ_v dz_v E[v],    dα_k = dh̄·h^(k);    dF[x̂] += r (hard) or dF[v] += y_v r (soft)

Kernels keep of a sample its token and y_x̂, the largest y of the row (``peak``), and make y again from

    y_v = y_x̂ exp((s_v − s_x̂)/τ),    s = z + g

A log-sum-exp is nothing to keep: it is of the size of s/τ, and its rounding alone changes y where τ is small or logits
are large. Nor does dz change when a constant, F[x̂]·r, is taken off all F[v]·r of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repdeg_fast.reference import philox
from repdeg_fast.reference.cosreg import arithmetic_dtype

_CHUNK = 1 << 23  # logits held at a time


def gumbel_mix(
    hidden_states: Tensor,  # (K, M, d)
    mixture_logits: Tensor,  # (M, K)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    embedding: Tensor,  # (V, d_f)
    seed: Tensor,
    temperature: float,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable by autograd (``gradient_scale`` 1), K·M·V logits: for tests and benchmarks."""
    logits = hidden_states.detach() @ weight.detach().T
    if bias is not None:
        logits = logits + bias.detach()
    mixed = torch.einsum("mk,kmv->mv", mixture_logits.softmax(dim=1), logits)
    noise = philox.gumbel(seed, range(len(mixed)), range(len(weight)), dtype=mixed.dtype)
    y = ((mixed + noise) / temperature).softmax(dim=1)
    token_ids = y.argmax(dim=1)
    if hard:
        y = torch.nn.functional.one_hot(token_ids, len(weight)) - y.detach() + y
    return token_ids, y @ embedding


def mix(hidden_states: Tensor, mixture_logits: Tensor | None) -> Tensor:
    """h̄ (M, d) in the dtype of the hidden states, summed in fp32 (float64); no mixture logits: K is 1."""
    if mixture_logits is None:
        return hidden_states[0]
    alpha = mixture_logits.to(arithmetic_dtype(hidden_states)).softmax(dim=1)
    mixed = alpha[:, :1] * hidden_states[0]
    for k in range(1, len(hidden_states)):
        mixed += alpha[:, k : k + 1] * hidden_states[k]
    return mixed.to(hidden_states.dtype)


def mix_backward(grad_mixed: Tensor, hidden_states: Tensor, mixture_logits: Tensor) -> Tensor:
    """The gradient of the mixture logits, (M, K) in their dtype, from that of h̄."""
    alpha = mixture_logits.to(grad_mixed.dtype).softmax(dim=1)
    grad_alpha = torch.stack([(grad_mixed * hidden).sum(dim=1) for hidden in hidden_states], dim=1)
    grad = alpha * (grad_alpha - (alpha * grad_alpha).sum(dim=1, keepdim=True))
    return grad.to(mixture_logits.dtype)


def sample(
    token_ids: Tensor,  # (M,), written
    peak: Tensor,  # (M,), written
    mixed: Tensor,  # (M, d)
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    temperature: float,
) -> None:
    """x̂ and y_x̂. Where a logit is NaN or +∞, or all are −∞, y_x̂ is not finite, and x̂ is any token."""
    for rows in _row_chunks(mixed, weight):
        part = slice(rows.start, rows.stop)
        perturbed = _perturbed_logits(mixed, weight, bias, seed, rows)
        _draw(token_ids[part], peak[part], perturbed, temperature)


def sample_logits(
    token_ids: Tensor,  # (M,), written
    peak: Tensor,  # (M,), written
    logits: Tensor,  # (K, M, V), without the bias
    alpha: Tensor,  # (M, K)
    bias: Tensor | None,
    seed: Tensor,
    temperature: float,
    first_row: int,  # whose noise the first row gets
) -> None:
    """x̂ and y_x̂ from the K heads' logits, where something else has made them."""
    mixed = torch.einsum("mk,kmv->mv", alpha, logits.to(alpha.dtype))
    if bias is not None:
        mixed += bias
    rows, columns = range(first_row, first_row + len(mixed)), range(mixed.shape[1])
    mixed += philox.gumbel(seed, rows, columns, dtype=mixed.dtype)
    _draw(token_ids, peak, mixed, temperature)


def soft_value(
    value: Tensor,  # (M, d_f), written
    mixed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    seed: Tensor,
    temperature: float,
) -> None:
    """Σ_v y_v F[v]. Of the sample, only kernels need anything: here y is a softmax."""
    for rows in _row_chunks(mixed, weight):
        part = slice(rows.start, rows.stop)
        y = (_perturbed_logits(mixed, weight, bias, seed, rows) / temperature).softmax(dim=1)
        value[part] = y @ embedding.to(y.dtype)


def backward(
    grad_mixed: Tensor | None,  # (M, d), written where given
    grad_embedding: Tensor | None,  # (V, d_f), the gradient of the soft value, written where given
    grad_embeddings: Tensor,  # (M, d_f)
    mixed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    seed: Tensor,
    temperature: float,
) -> None:
    """dh̄ and, for a soft value, dF. Products F[v]·r are taken from that of the drawn token, so that what rows of F have
    in common cancels before it is rounded. For dh̄ kernels divide y by what it adds up to: ``peak`` need only be near,
    as it is where the sample was drawn from logits that had been rounded."""
    r = grad_embeddings.to(peak.dtype)
    total = None if grad_embedding is None else torch.zeros_like(grad_embedding, dtype=peak.dtype)
    for rows in _row_chunks(mixed, weight):
        part = slice(rows.start, rows.stop)
        y = (_perturbed_logits(mixed, weight, bias, seed, rows) / temperature).softmax(dim=1)
        if total is not None:
            total.addmm_(y.T, r[part])
        if grad_mixed is not None:
            fr = r[part] @ embedding.to(r.dtype).T
            fr -= fr.gather(1, token_ids[part, None])
            delta = (y * fr).sum(dim=1, keepdim=True)
            grad_mixed[part] = (y * (fr - delta) / temperature) @ _operand(weight, mixed)
    if grad_embedding is not None and total is not None:
        grad_embedding.copy_(total)


def _draw(token_ids: Tensor, peak: Tensor, perturbed: Tensor, temperature: float) -> None:
    token_ids.copy_(perturbed.argmax(dim=1))
    peak.copy_((perturbed / temperature).softmax(dim=1).gather(1, token_ids[:, None]).squeeze(1))


def _operand(weight: Tensor, mixed: Tensor) -> Tensor:
    """``weight`` rounded to the dtype of the hidden states, which is what gets multiplied, and widened to sum."""
    return weight.to(mixed.dtype).to(arithmetic_dtype(mixed))


def _perturbed_logits(mixed: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, rows: range) -> Tensor:
    wide = arithmetic_dtype(mixed)
    logits = mixed[rows.start : rows.stop].to(wide) @ _operand(weight, mixed).T
    if bias is not None:
        logits += bias
    return logits + philox.gumbel(seed, rows, range(len(weight)), dtype=wide)


def _row_chunks(mixed: Tensor, weight: Tensor) -> Iterator[range]:
    step = max(1, _CHUNK // len(weight))
    for first in range(0, len(mixed), step):
        yield range(first, min(first + step, len(mixed)))
