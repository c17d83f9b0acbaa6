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

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast._mixture import mix, mix_backward
from repdeg_fast.contracts.gumbel_mix import (
    Drawn,
    Estimator,
    Gradients,
    HeadLogits,
    Heads,
    Noise,
    Projection,
    Wanted,
)
from repdeg_fast.reference import philox

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


def forward(
    heads: Heads, projection: Projection, embedding: Tensor, noise: Noise, *, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The value, x̂ and y_x̂. Where a logit is NaN or +∞, or all are −∞, y_x̂ is not finite, and x̂ is any token."""
    mixed = mix(*heads)
    drawn = Drawn(
        mixed.new_empty(len(mixed), dtype=torch.int64), mixed.new_empty(len(mixed), dtype=arithmetic_dtype(mixed))
    )
    soft = drawn.peak.new_empty(len(mixed), embedding.shape[1])
    for rows in _row_chunks(mixed, projection.weight):
        part = slice(rows.start, rows.stop)
        perturbed = _perturbed_logits(mixed, projection, noise, rows)
        _draw(Drawn(drawn.token_ids[part], drawn.peak[part]), perturbed, noise)
        if not hard:
            soft[part] = (perturbed / noise.temperature).softmax(dim=1) @ embedding.to(soft.dtype)
    return embed(embedding, drawn) if hard else _or_nan(soft.to(embedding.dtype), drawn), *drawn


def room(dtype: torch.dtype, temperature: float | None) -> int:
    """Candidates are for kernels: here every token is looked at."""
    return 0


def sample_logits(drawn: Drawn, block: HeadLogits, noise: Noise, candidates: Tensor | None = None) -> None:
    """x̂ and y_x̂ from the K heads' logits."""
    logits, mixture_logits, bias, first_row = block
    wide = drawn.peak.dtype
    alpha = (
        drawn.peak.new_ones(logits.shape[1], 1) if mixture_logits is None else mixture_logits.to(wide).softmax(dim=1)
    )
    mixed = torch.einsum("mk,kmv->mv", alpha, logits.to(wide))
    if bias is not None:
        mixed += bias
    first_row += noise.first_row
    rows, columns = range(first_row, first_row + len(mixed)), range(mixed.shape[1])
    mixed += philox.gumbel(noise.seed, rows, columns, dtype=wide)
    _draw(drawn, mixed, noise)


def embed(embedding: Tensor, drawn: Drawn) -> Tensor:
    """F[x̂]. A token was drawn even where a logit is NaN; the value says so."""
    return _or_nan(embedding.index_select(0, drawn.token_ids), drawn)


def backward(
    grad_values: Tensor, heads: Heads, projection: Projection, embedding: Tensor, drawn: Drawn, noise: Noise,
    estimator: Estimator, wanted: Wanted, candidates: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Products F[v]·r are taken from that of the drawn token, so that what rows of F have in common cancels before it
    is rounded. For dh̄ kernels divide y by what it adds up to: ``peak`` need only be near, as it is where the sample was
    drawn from logits that had been rounded."""
    mixed, weight = mix(*heads), projection.weight
    r = grad_values.to(drawn.peak.dtype)
    grad_mixed = r.new_empty(mixed.shape)
    grad_embedding = r.new_zeros(embedding.shape) if wanted.embedding and not estimator.hard else None
    for rows in _row_chunks(mixed, weight) if wanted.mixture_logits or not estimator.hard else ():
        part = slice(rows.start, rows.stop)
        y = (_perturbed_logits(mixed, projection, noise, rows) / noise.temperature).softmax(dim=1)
        if grad_embedding is not None:
            grad_embedding.addmm_(y.T, r[part])
        if wanted.mixture_logits:
            fr = r[part] @ embedding.to(r.dtype).T
            fr -= fr.gather(1, drawn.token_ids[part, None])
            delta = (y * fr).sum(dim=1, keepdim=True)
            grad_mixed[part] = (y * (fr - delta) / noise.temperature) @ _operand(weight, mixed)
    grad_mixture = None
    if wanted.mixture_logits and heads.mixture_logits is not None:
        grad_mixture = mix_backward(
            grad_mixed.mul_(estimator.gradient_scale), heads.hidden_states, heads.mixture_logits
        )
    if wanted.embedding and estimator.hard:
        return Gradients(grad_mixture, embed_backward(grad_values, embedding, drawn))
    return Gradients(grad_mixture, None if grad_embedding is None else grad_embedding.to(embedding.dtype))


def embed_backward(grad_values: Tensor, embedding: Tensor, drawn: Drawn) -> Tensor:
    """dF of hard values: rows of a token that was drawn more than once are added up."""
    grad: Tensor = torch.ops.aten.embedding_dense_backward(grad_values, drawn.token_ids, len(embedding), -1, False)
    return grad


def _draw(drawn: Drawn, perturbed: Tensor, noise: Noise) -> None:
    token_ids = perturbed.argmax(dim=1)
    drawn.token_ids.copy_(token_ids)
    drawn.peak.copy_((perturbed / noise.temperature).softmax(dim=1).gather(1, token_ids[:, None]).squeeze(1))


def _or_nan(values: Tensor, drawn: Drawn) -> Tensor:
    return values.masked_fill_(~drawn.peak.isfinite()[:, None], float("nan"))


def _operand(weight: Tensor, mixed: Tensor) -> Tensor:
    """``weight`` rounded to the dtype of the hidden states, which is what gets multiplied, and widened to sum."""
    return weight.to(mixed.dtype).to(arithmetic_dtype(mixed))


def _perturbed_logits(mixed: Tensor, projection: Projection, noise: Noise, rows: range) -> Tensor:
    wide, (weight, bias) = arithmetic_dtype(mixed), projection
    logits = mixed[rows.start : rows.stop].to(wide) @ _operand(weight, mixed).T
    if bias is not None:
        logits += bias
    rows = range(rows.start + noise.first_row, rows.stop + noise.first_row)
    return logits + philox.gumbel(noise.seed, rows, range(len(weight)), dtype=wide)


def _row_chunks(mixed: Tensor, weight: Tensor) -> Iterator[range]:
    step = max(1, _CHUNK // len(weight))
    for first in range(0, len(mixed), step):
        yield range(first, min(first + step, len(mixed)))
