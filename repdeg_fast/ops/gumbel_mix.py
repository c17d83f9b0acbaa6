"""The operators behind Gumbel mixing. Mathematics: :mod:`repdeg_fast.reference.gumbel_mix`.

Drawing a sample (no gradient) and its value (all of it) are two operators, so that a sweep over the vocabulary that
serves other ends can draw the sample too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.backends import Operation, no_float64, no_limit
from repdeg_fast.native import build
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.reference import gumbel_mix as reference
from repdeg_fast.reference.gumbel_mix import mix, mix_backward

operation = Operation[Any](
    "gumbel_mix",
    reference=reference,
    native=lambda namespace: build.operators(
        "gumbel_mix", *("sample", "sample_logits", "soft_value", "backward"), namespace=namespace
    ),
    triton=lambda: importlib.import_module("repdeg_fast.triton_kernels.gumbel_mix"),
    limits={"cpu": no_limit, "triton": no_float64},
)


@operator()
def gumbel_sample(
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Token ids x̂ (M,) and y_x̂ (M,). Not differentiable: takes detached tensors."""
    sample = Sample(hidden_states, mixture_logits, weight, bias, seed, temperature, backend)
    sample.from_hidden_states()
    return sample.token_ids, sample.peak


@gumbel_sample.register_fake
def _(hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_sample(hidden_states, hidden_states.shape[1])


class Sample:
    """Token ids and their y, drawn in a sweep over the vocabulary of its own or from logits that another
    sweep makes. Without a seed: none."""

    def __init__(
        self,
        hidden_states: Tensor,  # (K, M, d)
        mixture_logits: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        temperature: float,
        backend: str,
    ) -> None:
        self.token_ids, self.peak = empty_sample(hidden_states, 0 if seed is None else hidden_states.shape[1])
        self._heads = (hidden_states, mixture_logits, weight)
        self._options = (_wide(bias, self.peak), seed, temperature)
        if seed is not None:
            self._kernels = operation.kernels(backend, hidden_states, weight)

    def from_hidden_states(self) -> None:
        hidden_states, mixture_logits, weight = self._heads
        mixed = mix(hidden_states, mixture_logits)
        self._kernels.sample(self.token_ids, self.peak, mixed, weight, *self._options)

    def from_logits(self, logits: Tensor, first: int) -> None:
        """Those of the positions from ``first`` on, whose logits (K, m, V) are without the bias."""
        part, mixture_logits = slice(first, first + logits.shape[1]), self._heads[1]
        if mixture_logits is None:
            alpha = self.peak.new_ones(logits.shape[1], 1)
        else:
            alpha = mixture_logits[part].to(self.peak.dtype).softmax(dim=1)
        self._kernels.sample_logits(self.token_ids[part], self.peak[part], logits, alpha, *self._options, first)


def empty_sample(hidden_states: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Room for the token ids and the y of ``rows`` positions."""
    return (
        hidden_states.new_empty(rows, dtype=torch.int64),
        hidden_states.new_empty(rows, dtype=arithmetic_dtype(hidden_states)),
    )


@operator()
def gumbel_value(
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    seed: Tensor,
    temperature: float,
    hard: bool,
    gradient_scale: float,
    padding_idx: int | None,
    backend: str,
) -> Tensor:
    """Embeddings (M, d_f) of a sample: of its tokens, or the soft value. Gradients for the mixture logits and the
    embedding, whose row ``padding_idx`` gets none."""
    if hard:
        value = embedding.index_select(0, token_ids)
    else:
        sums = peak.new_empty(len(peak), embedding.shape[1])
        mixed = mix(hidden_states, mixture_logits)
        kernels = operation.kernels(backend, hidden_states, weight)
        kernels.soft_value(sums, mixed, weight, _wide(bias, peak), embedding, token_ids, peak, seed, temperature)
        value = sums.to(embedding.dtype)
    # a token was drawn even where a logit is NaN; the embedding says so
    return value.masked_fill_(~peak.isfinite()[:, None], float("nan"))


@gumbel_value.register_fake
def _(
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    *_: Any,
) -> Tensor:
    return embedding.new_empty(token_ids.shape[0], embedding.shape[1])


@operator()
def gumbel_mix_backward(
    grad_embeddings: Tensor,
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    seed: Tensor,
    temperature: float,
    hard: bool,
    gradient_scale: float,
    padding_idx: int | None,
    needs_mixture: bool,
    needs_embedding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the mixture logits and of the embedding; an empty tensor for one that is not needed."""
    grad_mixture, grad_embedding = peak.new_empty(0), peak.new_empty(0)
    if needs_embedding and hard:
        row = -1 if padding_idx is None else padding_idx
        grad_embedding = torch.ops.aten.embedding_dense_backward(grad_embeddings, token_ids, len(weight), row, False)
    elif needs_embedding:
        grad_embedding = torch.empty_like(embedding)
    if needs_mixture or (needs_embedding and not hard):
        mixed = mix(hidden_states, mixture_logits)
        grad_mixed = peak.new_empty(mixed.shape) if needs_mixture else None
        grad_soft = grad_embedding if needs_embedding and not hard else None
        operation.kernels(backend, hidden_states, weight).backward(
            grad_mixed,
            grad_soft,
            grad_embeddings,
            mixed,
            weight,
            _wide(bias, peak),
            embedding,
            token_ids,
            peak,
            seed,
            temperature,
        )
        if grad_soft is not None and padding_idx is not None:
            grad_soft[padding_idx] = 0
        if grad_mixed is not None and mixture_logits is not None:
            grad_mixture = mix_backward(grad_mixed.mul_(gradient_scale), hidden_states, mixture_logits)
    return grad_mixture, grad_embedding


@gumbel_mix_backward.register_fake
def _(
    grad_embeddings: Tensor,
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *_, needs_mixture, needs_embedding, _backend = options
    made = mixture_logits is not None and needs_mixture
    return (
        mixture_logits.new_empty(mixture_logits.shape) if mixture_logits is not None and made else peak.new_empty(0),
        embedding.new_empty(embedding.shape) if needs_embedding else peak.new_empty(0),
    )


gumbel_mix_backward.forbid_second_derivative("gumbel_mix")


class _Options(NamedTuple):
    temperature: float
    hard: bool
    gradient_scale: float
    padding_idx: int | None
    needs_mixture: bool
    needs_embedding: bool
    backend: str


@gumbel_value.register_formula("gumbel_mix")
class _Formula(Formula):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Tensor],
        hidden_states: Tensor,
        mixture_logits: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        embedding: Tensor,
        token_ids: Tensor,
        peak: Tensor,
        seed: Tensor,
        temperature: float,
        hard: bool,
        gradient_scale: float,
        padding_idx: int | None,
        backend: str,
    ) -> Tensor:
        tensors = (hidden_states, mixture_logits, weight, bias, embedding, token_ids, peak, seed)
        _, _, needs_mixture, _, _, needs_embedding, *_ = ctx.needs_input_grad  # of run, hidden states, mixture logits …
        ctx.options = _Options(temperature, hard, gradient_scale, padding_idx, needs_mixture, needs_embedding, backend)
        ctx.save_for_backward(*tensors)
        return run(*tensors, temperature, hard, gradient_scale, padding_idx, backend)

    @staticmethod
    def backward(ctx: Any, grad_embeddings: Tensor) -> tuple[Tensor | None, ...]:
        options = ctx.options
        arguments: Any = (grad_embeddings.contiguous(), *ctx.saved_tensors, *options)
        grad_mixture, grad_embedding = gumbel_mix_backward(*arguments)
        mixture = grad_mixture if options.needs_mixture else None
        embedding = grad_embedding if options.needs_embedding else None
        # of run, hidden states, mixture logits, weight, bias, embedding; token ids, peak, seed and five options
        return None, None, mixture, None, None, embedding, *(None,) * 8


def _wide(bias: Tensor | None, peak: Tensor) -> Tensor | None:
    """As the kernels take it: contiguous, in the arithmetic dtype."""
    return None if bias is None else bias.to(peak.dtype).contiguous()
