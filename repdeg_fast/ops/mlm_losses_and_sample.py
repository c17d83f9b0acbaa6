"""The operator of the joint form: :mod:`repdeg_fast.ops.linear_cross_entropy`'s losses of K heads, and the sample of
:mod:`repdeg_fast.ops.gumbel_mix`, in one sweep. Mathematics: :mod:`repdeg_fast.reference.mlm_losses_and_sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Head, LossRule, Wanted
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.ops.gumbel_mix import Sample, empty_sample
from repdeg_fast.ops.linear_cross_entropy import Context, Losses, Reduction, fake_losses, gradients_of, losses, save


class Joint(NamedTuple):
    """The fields of Losses, and the sample as ``gumbel_sample`` returns it."""

    loss: Tensor
    lse: Tensor
    grad_hidden_states: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    token_ids: Tensor
    peak: Tensor


@operator()
def mlm_losses_and_sample(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    mixture_logits: Tensor | None,
    seed: Tensor,
    temperature: float,
    heads: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    padding_idx: int | None,
    accumulate_dtype: torch.dtype,
    needs: list[bool],
    chunked: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Joint: the sample from the losses' logits where `chunked`, else in a sweep of its own."""
    head, rule = Head(hidden_states, weight, target, bias), LossRule(ignore_index, label_smoothing, softcap)
    by_head = hidden_states.unflatten(0, (heads, len(target)))
    of_losses = Reduction(heads, reduction, padding_idx)
    with torch.autocast(hidden_states.device.type, enabled=False):
        sample = Sample(by_head, mixture_logits, weight, bias, seed, temperature, backend)
        if chunked:
            found = losses(head, rule, of_losses, Wanted.of(needs, accumulate_dtype), backend, sample.from_logits)
        else:
            found = losses(head, rule, of_losses, None, backend)
            sample.from_hidden_states()
    return Joint(*found, sample.token_ids, sample.peak)


@mlm_losses_and_sample.register_fake
def _(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    mixture_logits: Tensor | None,
    seed: Tensor,
    temperature: float,
    heads: int,
    *options: Any,
) -> Joint:
    *_, reduction, _padding_idx, _accumulate_dtype, needs, chunked, _backend = options
    made = [chunked and need for need in needs]
    found = fake_losses(Head(hidden_states, weight, target, bias), heads, reduction, made)
    return Joint(*found, *empty_sample(hidden_states, target.shape[0]))


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
        mixture_logits: Tensor | None,
        seed: Tensor,
        temperature: float,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden_states, weight, target, bias)
        joint = Joint(*run(*head, mixture_logits, seed, temperature, *options))
        *context, chunked, backend = options
        save(ctx, head, Losses(*joint[:5]), Context(*context), chunked, backend)
        ctx.mark_non_differentiable(*joint[2:])
        return joint

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias = gradients_of(ctx, grad_loss, grad_lse)
        sampling = (None, None, None)  # mixture logits, seed, temperature
        options = (None,) * (len(Context._fields) + 2)  # and chunked, backend
        return None, hidden_states, weight, None, bias, *sampling, *options
