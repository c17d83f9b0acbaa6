"""What a step of AMOS takes from its K heads (arXiv 2204.03243, section 3): the losses of
:mod:`repdeg_fast.reference.linear_cross_entropy`, and a hard sample of :mod:`repdeg_fast.reference.gumbel_mix` from the
same heads. Both start from the logits E h^(k), so one sweep over the vocabulary serves both."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Head, LossRule
from repdeg_fast.reference import gumbel_mix, linear_cross_entropy


def mlm_losses_and_sample(
    hidden_states: Tensor,  # (K, M, d)
    mixture_logits: Tensor,  # (M, K)
    weight: Tensor,  # (V, d)
    target: Tensor,  # (M,)
    bias: Tensor | None,
    embedding: Tensor,  # (V, d_f)
    seed: Tensor,
    temperature: float,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, differentiable by autograd: losses (K,), means over the targets that count, token ids (M,) and
    their embeddings (M, d_f)."""
    head = Head(hidden_states.flatten(0, 1), weight, target, bias)
    rows, _ = linear_cross_entropy.forward(head, LossRule(ignore_index, 0.0, 0.0))
    counted = (target != ignore_index).sum().clamp_min(1)
    losses = rows.view(len(hidden_states), len(target)).sum(dim=1) / counted
    token_ids, embeddings = gumbel_mix.gumbel_mix(
        hidden_states, mixture_logits, weight, bias, embedding, seed, temperature, hard=True
    )
    return losses, token_ids, embeddings
