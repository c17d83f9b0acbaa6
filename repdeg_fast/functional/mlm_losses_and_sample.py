"""The losses of K heads and a sample of their mixture in one sweep: arguments checked, then handed to
:mod:`repdeg_fast.ops.mlm_losses_and_sample` and :mod:`repdeg_fast.ops.gumbel_mix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repdeg_fast import backends
from repdeg_fast._checks import is_cut
from repdeg_fast._seeds import seed_tensor
from repdeg_fast.contracts.linear_cross_entropy import Head
from repdeg_fast.functional._head_arguments import (
    Options,
    arguments,
    check_heads,
    check_options,
    check_tensors,
    stacked,
)
from repdeg_fast.functional.gumbel_mix import check_head, check_sampling, detached
from repdeg_fast.ops import mlm_losses_and_sample as _ops
from repdeg_fast.ops._operator import is_constant
from repdeg_fast.ops.gumbel_mix import gumbel_mix, gumbel_value
from repdeg_fast.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from repdeg_fast.distributed import VocabularyShard


def mlm_losses_and_sample(
    hidden_states: Tensor | Sequence[Tensor],  # (K, M, d), or K of (M, d)
    mixture_logits: Tensor | None,  # (M, K)
    weight: Tensor,  # (V, d)
    target: Tensor,  # (M,)
    bias: Tensor | None = None,  # (V,)
    embedding: Tensor | None = None,  # (V, d_f)
    *,
    temperature: float = 0.3,
    gradient_scale: float = -1.0,
    seed: int | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    strategy: str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
    first_position: int = 0,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step of AMOS takes from its heads (arXiv 2204.03243, section 3): :func:`repdeg_fast.multi_layer_mlm_loss`
    and a hard :func:`repdeg_fast.gumbel_mix` of the same heads, in one sweep over the vocabulary.

    Where the losses are computed in chunks, the mixture is made of the K logits that are there, and sampling costs no
    product with the vocabulary. Those logits are in the dtype of ``hidden_states``: in 16 bits a token may differ from
    that of :func:`repdeg_fast.gumbel_mix` where the two best are within their rounding. With ``strategy="streaming"``
    or ``reduction="none"`` there are two sweeps.

    Args:
        hidden_states, weight, target, bias, ignore_index, label_smoothing, reduction, strategy, accumulate_dtype: as in
            :func:`repdeg_fast.multi_layer_mlm_loss`.
        mixture_logits, embedding, temperature, gradient_scale, seed, first_position, shard: as in
            :func:`repdeg_fast.gumbel_mix`.
        padding_idx: a token whose rows of ``weight`` and ``embedding`` get no gradient, sampled or not.

    Returns:
        Losses (K,) (or (K, M) for ``reduction="none"``), token ids (M,) and their embeddings (M, d_f).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    embedding = weight if embedding is None else embedding
    given = Options(ignore_index, label_smoothing, None, reduction, strategy, accumulate_dtype, padding_idx)
    check_sampling(temperature, gradient_scale, first_position)
    if is_cut(weight, shard):
        from repdeg_fast.distributed import gumbel_mix as over_shards

        asked = over_shards.Sampling(seed, float(temperature), first_position, True, float(gradient_scale))
        tensors = (hidden_states, mixture_logits, weight, target, bias, embedding)
        return over_shards.mlm_losses_and_sample(*tensors, given, asked, shard, backends.requested())
    hidden_states, checked = check_tensors(stacked(hidden_states), weight, target, bias, check_options(given))
    check_heads(hidden_states.shape, target)
    check_head(hidden_states, mixture_logits, weight, bias, embedding)
    seed = seed_tensor(seed, hidden_states.device)
    head = Head(hidden_states.reshape(-1, hidden_states.shape[-1]), weight, target.contiguous(), bias)
    class_weight, *options, _, chunked, backend = arguments(head, hidden_states.shape[0], checked, samples=True)
    heads = (hidden_states.detach(), mixture_logits, weight.detach(), detached(bias), embedding)
    sampling, estimator = (seed, float(temperature), first_position), (float(gradient_scale), checked.padding_idx)
    flat: Any  # the arguments of an operator
    if not chunked:
        flat = (*head, class_weight, *options, False, chunked, backend)
        loss, *_ = linear_cross_entropy(*flat)
        flat = (*heads, *sampling, True, *estimator, backend)
        values, token_ids, _ = gumbel_mix(*flat)
        return loss, token_ids, values
    any_temperature = not is_constant(temperature)
    drawing = (seed, float(temperature), any_temperature, first_position)
    flat = (*head, class_weight, detached(mixture_logits), *drawing, *options, backend)
    loss, _, _, _, _, *sample = _ops.mlm_losses_and_sample(*flat)
    flat = (*heads, *sample, *sampling, *estimator, backend)
    return loss, sample[0], gumbel_value(*flat)
