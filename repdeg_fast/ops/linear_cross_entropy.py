"""The operators behind the linear cross entropy. Mathematics: :mod:`repdeg_fast.reference.linear_cross_entropy`.

*Chunked* makes the gradients of Σ_k loss_k in the forward pass and scales them in the backward pass; they are what it
saves. One scale serves them only if all K heads have the same upstream gradient, which a sum or a mean of the losses
gives. Otherwise, and when the graph is run a second time, the gradients are made again. *Streaming* saves the
log-sum-exp of every row and makes the gradients in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, without_autocast
from repdeg_fast.backends import Operation, no_float64, no_limit
from repdeg_fast.contracts.linear_cross_entropy import (
    Gradients,
    Head,
    Kernels,
    Look,
    Losses,
    LossRule,
    Upstream,
    Wanted,
)
from repdeg_fast.ops import native_linear_cross_entropy as native
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.ops.chunked_logits import NOTHING
from repdeg_fast.reference import linear_cross_entropy as reference


def _triton() -> Kernels:
    from repdeg_fast.ops import triton_linear_cross_entropy

    return triton_linear_cross_entropy.Kernels()


operation = Operation[Kernels](
    "linear_cross_entropy",
    reference=reference,
    native=native.Kernels,
    triton=_triton,
    limits={"cpu": no_limit, "triton": no_float64},
)


def choose_strategy(
    rows: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    *,
    upstream_known: bool,
    buffer_bytes: int,
    memory: int | None,
) -> str:
    """``strategy="auto"``: chunked, which is three GEMMs instead of four or more, wherever it can be used.

    It cannot where the upstream gradients differ from row to row (``reduction="none"``, a differentiable
    log-sum-exp). It should not in fp16, where gradients that are rounded before the loss scale is known underflow, and
    where its buffer and the gradients that it holds from the forward pass on would take more than a quarter of the
    device's ``memory`` (``None``: unknown, taken as plenty). A quarter leaves room for the parameters, their gradients
    and the optimizer's state, each of which is as large as the weight's gradient. What is free at the moment
    is not asked: it would cost as much as a small call, and make equal calls differ.
    """
    needed = buffer_bytes + (vocabulary + rows) * width * dtype.itemsize
    short = memory is not None and 4 * needed > memory
    if not upstream_known or dtype == torch.float16 or short:
        return "streaming"
    return "chunked"


class Reduction(NamedTuple):
    """How the rows' losses become K losses, and which row of the weight gets no gradient."""

    heads: int
    name: str  # "mean", "sum" or "none"
    padding_idx: int | None


_NO_GRADIENTS = Gradients(None, None, None)


@operator()
def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Losses, with the needed gradients where `chunked`."""
    head, rule = Head(hidden_states, weight, target, bias), LossRule(ignore_index, label_smoothing, softcap)
    wanted = Wanted.of(needs, accumulate_dtype) if chunked else None
    return losses(head, rule, Reduction(heads, reduction, padding_idx), wanted, backend)


def losses(
    head: Head, rule: LossRule, reduction: Reduction, wanted: Wanted | None, backend: str, look: Look | None = None
) -> Losses:
    """One sweep; ``wanted``: with gradients, and a look at the logits. ``None``: streaming."""
    hidden_states, weight, _, _ = head
    kernels, mean = operation.kernels(backend, hidden_states, weight), reduction.name == "mean"
    if look is None and reduction.name != "none":
        found = kernels.at_once(head, rule, reduction.heads, mean, wanted or NOTHING)
        if found is not None:
            _clear_padding(found.grad_weight, reduction.padding_idx)
            return found
    share = kernels.share(head, rule, mean)
    gradients = _NO_GRADIENTS
    with without_autocast(hidden_states.device.type):
        if wanted is None:
            rows, lse = kernels.forward(head, rule)
        else:
            grad_loss = share.expand(hidden_states.shape[0])
            rows, lse, gradients = kernels.forward_backward(grad_loss, head, rule, wanted, look)
        if reduction.name == "none":
            loss = rows.clone().view(reduction.heads, head.target.shape[0])
        else:
            loss = kernels.total(rows, reduction.heads, share)
    return Losses(loss, lse, *_filled(gradients, hidden_states, reduction.padding_idx))


@linear_cross_entropy.register_fake
def _(hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, heads: int, *options: Any) -> Losses:
    *_, reduction, _padding_idx, _accumulate_dtype, needs, chunked, _backend = options
    return fake_losses(
        Head(hidden_states, weight, target, bias), heads, reduction, [chunked and need for need in needs]
    )


def fake_losses(head: Head, heads: int, reduction: str, made: list[bool]) -> Losses:
    hidden_states, _, target, _ = head
    dtype = arithmetic_dtype(hidden_states)  # sizes by shape: len() would not do for symbolic ones
    loss = hidden_states.new_empty((heads, target.shape[0]) if reduction == "none" else (heads,), dtype=dtype)
    lse = hidden_states.new_empty(hidden_states.shape[0], dtype=dtype)
    return Losses(loss, lse, *_empty_gradients(head, made))


@operator()
def linear_cross_entropy_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor | None,
    heads: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    padding_idx: int | None,
    accumulate_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed gradients of Σ grad_loss·loss + Σ grad_lse·lse (else empty); ``lse=None``: it was not saved."""
    head, rule = Head(hidden_states, weight, target, bias), LossRule(ignore_index, label_smoothing, softcap)
    wanted, kernels = Wanted.of(needs, accumulate_dtype), operation.kernels(backend, hidden_states, weight)
    grad_rows = _row_gradients(kernels, grad_loss, head, rule, Reduction(heads, reduction, padding_idx))
    with without_autocast(hidden_states.device.type):
        if lse is None and grad_lse is None:
            *_, gradients = kernels.forward_backward(grad_rows, head, rule, wanted)
        else:
            lse = kernels.forward(head, rule)[1] if lse is None else lse
            upstream = Upstream(grad_rows, None if grad_lse is None else grad_lse.contiguous())
            gradients = kernels.backward(upstream, head, lse, rule, wanted)
    return _filled(gradients, hidden_states, padding_idx)


@linear_cross_entropy_backward.register_fake
def _(
    grad_loss: Tensor | None, grad_lse: Tensor | None, hidden_states: Tensor, weight: Tensor, target: Tensor,
    bias: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *_, needs, _backend = options
    return _empty_gradients(Head(hidden_states, weight, target, bias), needs)


linear_cross_entropy_backward.forbid_second_derivative("linear_cross_entropy")


@operator(mutates=("grad_hidden", "grad_weight", "grad_bias"))
def linear_cross_entropy_rescale_(
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_loss: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    heads: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    padding_idx: int | None,
    accumulate_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> None:
    """Turn the gradients of Σ loss, made in the forward pass, into those of Σ grad_loss·loss, in place."""
    head, rule = Head(hidden_states, weight, target, bias), LossRule(ignore_index, label_smoothing, softcap)
    kernels, of_losses = operation.kernels(backend, hidden_states, weight), Reduction(heads, reduction, None)
    made = _needed((grad_hidden, grad_weight, grad_bias), needs)
    rows = partial(_row_gradients, kernels, grad_loss, head, rule, of_losses)
    with without_autocast(hidden_states.device.type):
        kernels.rescale_(made, grad_loss, rows, head, rule, Wanted.of(needs, accumulate_dtype))
    _clear_padding(grad_weight, padding_idx)


@linear_cross_entropy_rescale_.register_fake
def _(*_: Any) -> None:
    pass


class Context(NamedTuple):
    """What a formula keeps beside tensors."""

    heads: int
    ignore_index: int
    label_smoothing: float
    softcap: float
    reduction: str
    padding_idx: int | None
    accumulate_dtype: torch.dtype
    needs: list[bool]


def save(ctx: Any, head: Head, found: Losses, context: Context, chunked: bool, backend: str) -> None:
    """*Chunked* keeps the gradients that it made, *streaming* the log-sum-exp."""
    ctx.save_for_backward(*head, *(found[2:] if chunked else (found.lse,)))
    ctx.context, ctx.chunked, ctx.backend, ctx.made_used = context, chunked, backend, False
    ctx.set_materialize_grads(False)


def gradients_of(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """Those of hidden states, weight and bias, from what :func:`save` kept."""
    if grad_loss is None and grad_lse is None:
        return _NO_GRADIENTS
    hidden_states, weight, target, bias, *kept = ctx.saved_tensors
    options: Any = (*ctx.context, ctx.backend)
    # with gradients enabled (create_graph) the result must carry the error about second derivatives
    if ctx.chunked and grad_loss is not None and grad_lse is None and not ctx.made_used and not torch.is_grad_enabled():
        ctx.made_used = True
        # .data: scaled under another version counter, since a second backward pass unpacks but does not use them
        made = (kept[0].data, kept[1].data, kept[2].data)
        linear_cross_entropy_rescale_(*made, grad_loss, hidden_states, weight, target, bias, *options)
    else:
        lse = None if ctx.chunked else kept[0]
        made = linear_cross_entropy_backward(grad_loss, grad_lse, hidden_states, weight, target, bias, lse, *options)
    return _needed(made, ctx.context.needs)


@linear_cross_entropy.register_formula("linear_cross_entropy")
class _Formula(Formula):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], hidden_states: Tensor, weight: Tensor, target: Tensor,
        bias: Tensor | None, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        found = Losses(*run(hidden_states, weight, target, bias, *options))
        *context, chunked, backend = options
        save(ctx, Head(hidden_states, weight, target, bias), found, Context(*context), chunked, backend)
        ctx.mark_non_differentiable(found.grad_hidden_states, found.grad_weight, found.grad_bias)
        return found

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias = gradients_of(ctx, grad_loss, grad_lse)
        options = (None,) * (len(Context._fields) + 2)  # and chunked, backend
        return None, hidden_states, weight, None, bias, *options


def _needed(made: tuple[Tensor, Tensor, Tensor], needs: list[bool]) -> Gradients:
    (hidden_states, weight, bias), (of_hidden, of_weight, of_bias) = made, needs
    return Gradients(hidden_states if of_hidden else None, weight if of_weight else None, bias if of_bias else None)


def _row_gradients(
    kernels: Kernels, grad_loss: Tensor | None, head: Head, rule: LossRule, reduction: Reduction
) -> Tensor:
    """(N,), from (K, M) or (K,); one value expanded where it serves every row."""
    heads, positions = reduction.heads, head.target.shape[0]
    if grad_loss is None:
        dtype = arithmetic_dtype(head.hidden_states)
        return head.hidden_states.new_zeros((), dtype=dtype).expand(heads * positions)
    if reduction.name == "none":
        return grad_loss.reshape(-1)
    per_head = grad_loss
    if reduction.name == "mean":
        per_head = grad_loss * kernels.share(head, rule, True)
    return per_head.expand(positions) if heads == 1 else per_head[:, None].expand(heads, positions).reshape(-1)


def _empty_gradients(head: Head, made: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    hidden_states, weight, _, bias = head
    bias_like = hidden_states if bias is None else bias
    return (
        hidden_states.new_empty(hidden_states.shape if made[0] else (0,)),
        weight.new_empty(weight.shape if made[1] else (0,)),
        bias_like.new_empty(weight.shape[:1] if made[2] else (0,)),
    )


def _filled(gradients: Gradients, like: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Operators return tensors: an empty one for a gradient that is not needed. The padding row gets none."""
    grad_hidden, grad_weight, grad_bias = (like.new_empty(0) if g is None else g for g in gradients)
    _clear_padding(grad_weight, padding_idx)
    return grad_hidden, grad_weight, grad_bias


def _clear_padding(grad_weight: Tensor, padding_idx: int | None) -> None:
    if padding_idx is not None and grad_weight.numel():
        grad_weight[padding_idx] = 0
