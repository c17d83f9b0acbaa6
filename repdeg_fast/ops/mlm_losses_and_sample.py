"""The operator of the joint form: :mod:`repdeg_fast.ops.linear_cross_entropy`'s losses of K heads, in chunks, and the
sample of :mod:`repdeg_fast.ops.gumbel_mix`, in one sweep. Mathematics:
:mod:`repdeg_fast.reference.mlm_losses_and_sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast.contracts.gumbel_mix import Drawn, HeadLogits, Noise
from repdeg_fast.contracts.linear_cross_entropy import Head, Losses, Wanted
from repdeg_fast.ops import gumbel_mix
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.ops.linear_cross_entropy import Context, Reduction, fake_losses, gradients_of, losses, rule_of, save


class Joint(NamedTuple):
    """The fields of Losses, and those of a sample."""

    loss: Tensor
    lse: Tensor
    grad_hidden_states: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    token_ids: Tensor
    peak: Tensor
    candidates: Tensor


@operator()
def mlm_losses_and_sample(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    mixture_logits: Tensor | None,
    seed: Tensor,
    temperature: float,
    any_temperature: bool,
    first_position: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    gradient_filter: float,
    heads: int,
    lse_square_scale: float,
    reduction: str,
    padding_idx: int | None,
    accumulate_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Joint: the sample is drawn from the losses' logits. ``any_temperature``: there is room for what is
    kept at any, whatever this one is."""
    head = Head(hidden_states, weight, target, bias)
    rule = rule_of(hidden_states, class_weight, ignore_index, label_smoothing, softcap, gradient_filter)
    wanted, noise = Wanted.of(needs, accumulate_dtype), Noise(seed, temperature, first_position)
    kernels = gumbel_mix.operation.kernels(backend, hidden_states, weight)
    drawn = gumbel_mix.empty_sample(hidden_states, len(target))
    known = None if any_temperature else temperature
    candidates = gumbel_mix.empty_candidates(hidden_states, weight, len(target), known, backend)
    keeps = kernels.room(hidden_states.dtype, temperature) > 0

    def look(logits: Tensor, first: int) -> None:
        part = slice(first, first + logits.shape[1])
        shares = None if mixture_logits is None else mixture_logits[part]
        some = Drawn(drawn.token_ids[part], drawn.peak[part])
        kept = candidates[part] if keeps else None
        kernels.sample_logits(some, HeadLogits(logits, shares, bias, first), noise, kept)

    found = losses(head, rule, Reduction(heads, lse_square_scale, reduction, padding_idx), wanted, backend, look)
    return Joint(*found, *drawn, candidates)


@mlm_losses_and_sample.register_fake
def _(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    mixture_logits: Tensor | None,
    seed: Tensor,
    temperature: float,
    any_temperature: bool,
    *options: Any,
) -> Joint:
    *_, heads, _lse_square_scale, reduction, _padding_idx, _accumulate_dtype, needs, backend = options
    found = fake_losses(Head(hidden_states, weight, target, bias), heads, reduction, needs)
    rows = target.shape[0]
    known = None if any_temperature else temperature
    candidates = gumbel_mix.empty_candidates(hidden_states, weight, rows, known, backend)
    return Joint(*found, *gumbel_mix.empty_sample(hidden_states, rows), candidates)


@mlm_losses_and_sample.register_formula("mlm_losses_and_sample")
class _Formula(Formula):
    """The losses' own; the sample has its gradient in ``gumbel_value``."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, ...]],
        hidden_states: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        mixture_logits: Tensor | None,
        seed: Tensor,
        temperature: float,
        any_temperature: bool,
        first_position: int,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden_states, weight, target, bias)
        sampling = (seed, temperature, any_temperature, first_position)
        joint = Joint(*run(*head, class_weight, mixture_logits, *sampling, *options))
        *context, backend = options
        save(ctx, head, class_weight, Losses(*joint[:5]), Context(*context), True, backend)
        ctx.mark_non_differentiable(*joint[2:])
        return joint

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias = gradients_of(ctx, grad_loss, grad_lse)
        sampling = (None,) * 6  # class weights, mixture logits, seed, temperature, whether any, first position
        options = (None,) * (len(Context._fields) + 1)  # and backend
        return None, hidden_states, weight, None, bias, *sampling, *options
