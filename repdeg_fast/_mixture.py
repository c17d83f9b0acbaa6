"""The mixture of K heads: α = softmax(mixture logits), h̄ = Σ_k α_k h^(k), and its gradient, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype


def mix(hidden_states: Tensor, mixture_logits: Tensor | None) -> Tensor:
    """h̄ (M, d) in the dtype of the hidden states (K, M, d), summed in fp32 (float64); no mixture logits: K is 1."""
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
