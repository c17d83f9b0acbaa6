"""Linear cross entropy and the shared multi-layer MLM loss: arguments checked, then handed to
:mod:`repdeg_fast.ops.linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from repdeg_fast import backends
from repdeg_fast._checks import is_cut
from repdeg_fast.contracts.linear_cross_entropy import Head
from repdeg_fast.functional._head_arguments import (
    Options,
    arguments,
    check_heads,
    check_options,
    check_tensors,
    shifted,
    stacked,
)
from repdeg_fast.functional._head_outputs import CrossEntropyOutput, checked, told, told_of_heads
from repdeg_fast.ops import linear_cross_entropy as _ops

if TYPE_CHECKING:
    from repdeg_fast.distributed import VocabularyShard


def linear_cross_entropy(
    hidden_states: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    target: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    strategy: str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    return_lse: bool = False,
    padding_idx: int | None = None,
    class_weight: Tensor | None = None,  # (V,)
    lse_square_scale: float = 0.0,
    shift: bool | int = False,
    gradient_filter: float | None = None,
    return_z_loss: bool = False,
    return_predictions: bool = False,
    return_accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Tensor | tuple[Tensor, Tensor] | CrossEntropyOutput:
    """``F.cross_entropy(F.linear(hidden_states, weight, bias).float(), target)`` and its gradients without the logits.

    Args:
        hidden_states: (..., d), float32, float64, bfloat16 or float16, any strides. Under autocast it is converted to
            the autocast dtype, which is then what is multiplied; the weight may stay in float32.
        weight: (V, d), of the same dtype outside autocast, any strides; usually the tied word embedding.
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        bias: (V,). −∞ takes a class out of the softmax.
        label_smoothing: in [0, 1].
        softcap: c of c·tanh(logits/c).
        reduction: ``"mean"`` over the targets that count, ``"sum"``, or ``"none"``. A mean over no target is 0 with
            zero gradients (PyTorch: NaN): a batch without masks must not poison a run.
        strategy: ``"chunked"`` makes the gradients in the forward pass (three GEMMs) and keeps them; the buffer is at
            most 64 MiB on the CPU, where it is kept for the next call, and 1 GiB on a GPU (or 16 rows of logits). A
            16-bit weight, whose gradient is summed in ``accumulate_dtype``, takes all rows of logits at once or a wide
            copy of the gradient besides, whichever is less. ``"streaming"`` keeps one value a row and makes them in
            the backward pass. ``"auto"`` goes by shapes, dtype and the size of the device, not by what is free on it:
            the same call always does the same (see :func:`choose_strategy
            <repdeg_fast.ops.linear_cross_entropy.choose_strategy>`). Where no gradient is needed, none is made.
        accumulate_dtype: in which the weight's gradient is summed over chunks: float32, or the dtype of the weight.
        return_lse: return (loss, log-sum-exp of every row (...)); differentiable, for z-losses.
        padding_idx: a row of ``weight`` that gets no gradient, as in ``nn.Embedding``.
        class_weight: (V,), what each class weighs, as ``weight`` of ``F.cross_entropy``: a mean is over the weights of
            the targets, and label smoothing's part is weighted too. Any floating dtype; gets no gradient.
        lse_square_scale: adds this times lse² to each row that counts (z-loss, PaLM, arXiv 2204.02311, section 5). Its
            mean is over the number of targets that count, classes weigh nothing in it.
        shift: position t predicts ``target[..., t + shift]`` (``True``: 1), as in a causal model; what is returned for
            positions is (..., T − shift). Hidden states are not copied for it: the last ones run along, ignored.
        gradient_filter: leave out what a class less probable than this adds to gradients, unless it is the target. With
            p, y, g and u of :mod:`repdeg_fast.reference.linear_cross_entropy` the error of ∂/∂z is, for each class left
            out, below (g Σy + u)·gradient_filter in size, and for all of them together below (g Σy + u)·Σp of
            these; label smoothing adds g·y. The loss is exact. On a CPU, classes that are left out of all rows at hand
            are not multiplied; a GPU saves nothing by it. ``None``: exact.
        return_z_loss, return_predictions, return_accuracy: return these, too.
        shard: ``weight`` and ``bias`` are the rows that this rank has of a vocabulary cut over ranks, which have
            ``hidden_states`` and ``target`` whole; V, ``target`` and ``padding_idx`` are those of the whole. Not needed
            where ``weight`` is a DTensor with ``Shard(0)``. ``class_weight`` is whole, too.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or (...) for ``reduction="none"``. With any of
        ``return_z_loss``, ``return_predictions`` and ``return_accuracy`` a :class:`CrossEntropyOutput`.

    Raises:
        TypeError, ValueError: naming the argument. A target out of range raises on the CPU; on a GPU, where a check
            would stall the stream, it makes the row's loss NaN.
    """
    asked = checked(return_lse, return_z_loss, return_predictions, return_accuracy, shift)
    given = Options(
        ignore_index, label_smoothing, softcap, reduction, strategy, accumulate_dtype, padding_idx, class_weight,
        lse_square_scale, gradient_filter,
    )  # fmt: skip
    if is_cut(weight, shard):
        from repdeg_fast.distributed import linear_cross_entropy as over_shards

        backend = backends.requested()
        return over_shards.linear_cross_entropy(hidden_states, weight, target, bias, given, shard, backend, asked)
    hidden_states, options = check_tensors(hidden_states, weight, target, bias, check_options(given))
    positions = hidden_states.shape[:-1]
    if target.shape != positions:
        raise ValueError(
            f"target: expected shape {tuple(positions)}, that of hidden_states without its last dimension, "
            f"got {tuple(target.shape)}"
        )
    if shift:
        target = shifted(target, shift, ignore_index)
    if len(positions) != 1:
        hidden_states, target = hidden_states.reshape(-1, hidden_states.shape[-1]), target.reshape(-1)
    head = Head(hidden_states, weight, target.contiguous(), bias)
    flat = arguments(head, 1, options, upstream_known=not return_lse, predict=asked.predict)
    loss, lse, _, _, _, predicted = _ops.linear_cross_entropy(*head, *flat)
    return told((loss, lse, predicted), target, positions, options, asked)


@overload
def multi_layer_mlm_loss(
    hidden_states: Tensor | Sequence[Tensor],
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    strategy: str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
    class_weight: Tensor | None = None,
    lse_square_scale: float = 0.0,
    gradient_filter: float | None = None,
    return_z_loss: Literal[False] = False,
    return_predictions: Literal[False] = False,
    return_accuracy: Literal[False] = False,
    shard: VocabularyShard | None = None,
) -> Tensor: ...


@overload
def multi_layer_mlm_loss(
    hidden_states: Tensor | Sequence[Tensor],
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    strategy: str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
    class_weight: Tensor | None = None,
    lse_square_scale: float = 0.0,
    gradient_filter: float | None = None,
    return_z_loss: bool = False,
    return_predictions: bool = False,
    return_accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Tensor | CrossEntropyOutput: ...


def multi_layer_mlm_loss(
    hidden_states: Tensor | Sequence[Tensor],  # (K, M, d), or K of (M, d)
    weight: Tensor,  # (V, d)
    target: Tensor,  # (M,)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    strategy: str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
    class_weight: Tensor | None = None,  # (V,)
    lse_square_scale: float = 0.0,
    gradient_filter: float | None = None,
    return_z_loss: bool = False,
    return_predictions: bool = False,
    return_accuracy: bool = False,
    shard: VocabularyShard | None = None,
) -> Tensor | CrossEntropyOutput:
    """The masked-language-model losses of K layers through one shared projection (AMOS, arXiv 2204.03243, equation 4;
    Condenser, arXiv 2104.08253, equation 6).

    ``hidden_states`` is (K, M, d), or K tensors of shape (M, d), which are stacked; the rest is as in
    :func:`linear_cross_entropy`. The gradients of weight and bias are summed over the heads inside.

    The losses may be weighted in any way afterwards. *Chunked* is fastest when all heads have the same weight, as in
    a sum or a mean; otherwise it makes its gradients a second time in the backward pass: where the weights differ,
    name ``strategy="streaming"``.

    Returns:
        (K,), the loss of each head in float32 (float64 for float64 inputs), or (K, M) for ``reduction="none"``; with
        any of ``return_z_loss``, ``return_predictions`` and ``return_accuracy`` a :class:`CrossEntropyOutput`.

    Raises:
        TypeError, ValueError: naming the argument, as :func:`linear_cross_entropy`.
    """
    asked = checked(False, return_z_loss, return_predictions, return_accuracy)
    given = Options(
        ignore_index, label_smoothing, softcap, reduction, strategy, accumulate_dtype, padding_idx, class_weight,
        lse_square_scale, gradient_filter,
    )  # fmt: skip
    if is_cut(weight, shard):
        from repdeg_fast.distributed import linear_cross_entropy as over_shards

        return over_shards.multi_layer_mlm_loss(
            hidden_states, weight, target, bias, given, shard, backends.requested(), asked
        )
    hidden_states, options = check_tensors(stacked(hidden_states), weight, target, bias, check_options(given))
    check_heads(hidden_states.shape, target)
    heads = hidden_states.shape[0]
    head = Head(hidden_states.flatten(0, 1), weight, target.contiguous(), bias)
    flat = arguments(head, heads, options, predict=asked.predict)
    loss, lse, _, _, _, predicted = _ops.linear_cross_entropy(*head, *flat)
    return told_of_heads((loss, lse, predicted), target, heads, options, asked)
