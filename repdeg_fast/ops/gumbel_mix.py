"""The operators behind Gumbel mixing. Mathematics: :mod:`repdeg_fast.reference.gumbel_mix`.

``gumbel_mix`` draws a sample and gives its value; ``gumbel_value`` gives the value of one that another sweep over the
vocabulary has drawn. Both have the same derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, without_autocast
from repdeg_fast.backends import Operation, no_float64, no_limit
from repdeg_fast.contracts.gumbel_mix import (
    Drawn,
    Estimator,
    Heads,
    Kernels,
    Noise,
    Projection,
    Wanted,
)
from repdeg_fast.native import gumbel_mix as native
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.reference import gumbel_mix as reference


def _triton() -> Kernels:
    from repdeg_fast.ops import triton_gumbel_mix

    return triton_gumbel_mix.kernels


operation = Operation[Kernels](
    "gumbel_mix",
    reference=reference,
    native=native.Kernels,
    triton=_triton,
    limits={"cpu": no_limit, "triton": no_float64},
)


@operator()
def gumbel_mix(
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    seed: Tensor,
    temperature: float,
    first_position: int,
    hard: bool,
    gradient_scale: float,
    padding_idx: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (M, d_f), token ids x̂ (M,) and y_x̂ (M,). Gradients for the mixture logits and the embedding,
    whose row ``padding_idx`` gets none."""
    heads, projection = Heads(hidden_states, mixture_logits), Projection(weight, bias)
    kernels = operation.kernels(backend, hidden_states, weight)
    with without_autocast(hidden_states.device.type):
        noise = Noise(seed, temperature, first_position)
        return kernels.forward(heads, projection, embedding, noise, hard=hard)


@gumbel_mix.register_fake
def _(
    hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None, embedding: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = hidden_states.shape[1]
    return embedding.new_empty(rows, embedding.shape[1]), *empty_sample(hidden_states, rows)


def empty_sample(hidden_states: Tensor, rows: int) -> Drawn:
    """Room for the sample of ``rows`` positions."""
    return Drawn(
        hidden_states.new_empty(rows, dtype=torch.int64),
        hidden_states.new_empty(rows, dtype=arithmetic_dtype(hidden_states)),
    )


def empty_candidates(
    hidden_states: Tensor, weight: Tensor, rows: int, temperature: float | None, backend: str
) -> Tensor:
    """Room for what of the logits of ``rows`` positions is kept for the backward pass (rows, room); ``temperature``
    ``None``: whatever it will be."""
    room = operation.kernels(backend, hidden_states, weight).room(hidden_states.dtype, temperature)
    return hidden_states.new_empty(rows, room, dtype=torch.int32)


@operator()
def gumbel_value(
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    candidates: Tensor | None,
    seed: Tensor,
    temperature: float,
    first_position: int,
    gradient_scale: float,
    padding_idx: int | None,
    backend: str,
) -> Tensor:
    """The hard values (M, d_f) of a sample."""
    return operation.kernels(backend, hidden_states, weight).embed(embedding, Drawn(token_ids, peak))


@gumbel_value.register_fake
def _(
    hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None, embedding: Tensor,
    token_ids: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    return embedding.new_empty(token_ids.shape[0], embedding.shape[1])


@operator()
def gumbel_mix_backward(
    grad_values: Tensor,
    hidden_states: Tensor,
    mixture_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    token_ids: Tensor,
    peak: Tensor,
    candidates: Tensor | None,
    seed: Tensor,
    temperature: float,
    first_position: int,
    hard: bool,
    gradient_scale: float,
    padding_idx: int | None,
    needs_mixture: bool,
    needs_embedding: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the mixture logits and of the embedding; an empty tensor for one that is not needed."""
    heads, projection = Heads(hidden_states, mixture_logits), Projection(weight, bias)
    wanted = Wanted(needs_mixture and mixture_logits is not None, needs_embedding)
    kernels = operation.kernels(backend, hidden_states, weight)
    with without_autocast(hidden_states.device.type):
        grad_mixture, grad_embedding = kernels.backward(
            grad_values if grad_values.is_contiguous() else grad_values.contiguous(), heads, projection, embedding,
            Drawn(token_ids, peak), Noise(seed, temperature, first_position), Estimator(hard, gradient_scale), wanted,
            candidates if kernels.room(hidden_states.dtype, temperature) > 0 else None,
        )  # fmt: skip
    if padding_idx is not None and grad_embedding is not None:
        grad_embedding[padding_idx] = 0
    return (
        peak.new_empty(0) if grad_mixture is None else grad_mixture,
        peak.new_empty(0) if grad_embedding is None else grad_embedding,
    )


@gumbel_mix_backward.register_fake
def _(
    grad_values: Tensor, hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None,
    embedding: Tensor, token_ids: Tensor, peak: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *_, needs_mixture, needs_embedding, _backend = options
    made = mixture_logits is not None and needs_mixture
    return (
        mixture_logits.new_empty(mixture_logits.shape) if mixture_logits is not None and made else peak.new_empty(0),
        embedding.new_empty(embedding.shape) if needs_embedding else peak.new_empty(0),
    )


gumbel_mix_backward.forbid_second_derivative("gumbel_mix")


class _Context(NamedTuple):
    """What a formula keeps beside tensors: the last arguments of the backward operator."""

    temperature: float
    first_position: int
    hard: bool
    gradient_scale: float
    padding_idx: int | None
    needs_mixture: bool
    needs_embedding: bool
    backend: str


def _gradients_of(ctx: Any, grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of run, hidden states, mixture logits, weight, bias and embedding."""
    if grad_values is None:
        return (None,) * 6
    context = ctx.context
    arguments: Any = (grad_values, *ctx.saved_tensors, *context)
    grad_mixture, grad_embedding = gumbel_mix_backward(*arguments)
    mixture = grad_mixture if context.needs_mixture else None
    return None, None, mixture, None, None, grad_embedding if context.needs_embedding else None


@gumbel_mix.register_formula("gumbel_mix")
class _Formula(Formula):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, Tensor, Tensor]], hidden_states: Tensor,
        mixture_logits: Tensor | None, weight: Tensor, bias: Tensor | None, embedding: Tensor, seed: Tensor,
        temperature: float, first_position: int, hard: bool, gradient_scale: float, padding_idx: int | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        head = (hidden_states, mixture_logits, weight, bias, embedding)
        found = run(*head, seed, temperature, first_position, hard, gradient_scale, padding_idx, backend)
        _, token_ids, peak = found
        _, _, needs_mixture, _, _, needs_embedding, *_ = ctx.needs_input_grad  # of run, hidden states, mixture logits …
        ctx.save_for_backward(*head, token_ids, peak, None, seed)  # no candidates
        estimator = (hard, gradient_scale, padding_idx, needs_mixture, needs_embedding)
        ctx.context = _Context(temperature, first_position, *estimator, backend)
        ctx.mark_non_differentiable(token_ids, peak)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *_gradients_of(ctx, grad_values), *(None,) * 7  # of seed and six options


@gumbel_value.register_formula("gumbel_mix")
class _ValueFormula(Formula):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], hidden_states: Tensor, mixture_logits: Tensor | None, weight: Tensor,
        bias: Tensor | None, embedding: Tensor, token_ids: Tensor, peak: Tensor, candidates: Tensor | None,
        seed: Tensor, temperature: float, first_position: int, gradient_scale: float, padding_idx: int | None,
        backend: str,
    ) -> Tensor:  # fmt: skip
        tensors = (hidden_states, mixture_logits, weight, bias, embedding, token_ids, peak, candidates, seed)
        _, _, needs_mixture, _, _, needs_embedding, *_ = ctx.needs_input_grad
        ctx.save_for_backward(*tensors)
        estimator = (True, gradient_scale, padding_idx, needs_mixture, needs_embedding)
        ctx.context = _Context(temperature, first_position, *estimator, backend)
        return run(*tensors, temperature, first_position, gradient_scale, padding_idx, backend)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients_of(ctx, grad_values), *(None,) * 9  # of token ids, peak, candidates, seed and five options
