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
    ClassWeight,
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
from repdeg_fast.ops._operator import Formula, may_scale_in_place, operator
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
    """How the rows' losses become K losses, what of lse² is added, and which row of the weight gets no gradient."""

    heads: int
    lse_square_scale: float
    name: str  # "mean", "sum" or "none"
    padding_idx: int | None


def rule_of(
    hidden_states: Tensor, class_weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
    gradient_filter: float,
) -> LossRule:  # fmt: skip
    """From the arguments of an operator."""
    weight = None
    if class_weight is not None:
        each = class_weight.to(arithmetic_dtype(hidden_states)).contiguous()
        weight = ClassWeight(each, each.sum(dtype=torch.float64).to(each.dtype))
    return LossRule(ignore_index, label_smoothing, softcap, weight, gradient_filter)


_NO_GRADIENTS = Gradients(None, None, None)


@operator()
def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
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
    predict: bool,
    chunked: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Losses, with the needed gradients where `chunked`, and the predicted classes (else empty)."""
    head = Head(hidden_states, weight, target, bias)
    rule = rule_of(hidden_states, class_weight, ignore_index, label_smoothing, softcap, gradient_filter)
    wanted = Wanted.of(needs, accumulate_dtype) if chunked else None
    reduced = Reduction(heads, lse_square_scale, reduction, padding_idx)
    if not predict:
        return *losses(head, rule, reduced, wanted, backend), hidden_states.new_empty(0, dtype=torch.int64)
    predicted = hidden_states.new_empty(hidden_states.shape[0], dtype=torch.int64)
    return *losses(head, rule, reduced, wanted, backend, None, predicted), predicted


def losses(
    head: Head, rule: LossRule, reduction: Reduction, wanted: Wanted | None, backend: str, look: Look | None = None,
    predicted: Tensor | None = None,
) -> Losses:  # fmt: skip
    """One sweep; ``wanted``: with gradients, and a look at the logits. ``None``: streaming."""
    hidden_states, weight, target, _ = head
    heads, lse_square_scale, name, padding_idx = reduction
    kernels, mean = operation.kernels(backend, hidden_states, weight), name == "mean"
    plain = not lse_square_scale and rule.class_weight is None and not rule.gradient_filter
    if plain and look is None and predicted is None and name != "none":
        found = kernels.at_once(head, rule, heads, mean, wanted or NOTHING)
        if found is not None:
            _clear_padding(found.grad_weight, padding_idx)
            return found
    share = kernels.share(head, rule, mean)
    gradients = _NO_GRADIENTS
    with without_autocast(hidden_states.device.type):
        if wanted is None:
            rows, lse = kernels.forward(head, rule, predicted)
        else:
            of_square = None
            if lse_square_scale:
                of_square = (lse_square_scale * z_loss_share(target, rule.ignore_index, mean, share.dtype)).expand(
                    hidden_states.shape[0]
                )
            upstream = Upstream(share.expand(hidden_states.shape[0]), None, of_square)
            rows, lse, gradients = kernels.forward_backward(upstream, head, rule, wanted, look, predicted)
        none = name == "none"
        loss = rows.clone().view(heads, target.shape[0]) if none else kernels.total(rows, heads, share)
        if lse_square_scale:
            loss = loss + z_loss(lse, target, rule.ignore_index, reduction)
    return Losses(loss, lse, *_filled(gradients, hidden_states, padding_idx))


def z_loss_share(target: Tensor, ignore_index: int, mean: bool, dtype: torch.dtype) -> Tensor:
    """What lse² of each row that counts adds to a z-loss: classes have no weight there."""
    if not mean:
        return torch.ones((), dtype=dtype, device=target.device)
    return (target != ignore_index).sum().clamp_min(1).to(dtype).reciprocal()


def z_loss(lse: Tensor, target: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """lse_square_scale·lse² of each head, reduced, or (K, M)."""
    rows = lse.double().square().view(reduction.heads, target.shape[0]).where(target != ignore_index, 0)
    if reduction.name == "none":
        return (reduction.lse_square_scale * rows).to(lse.dtype)
    share = z_loss_share(target, ignore_index, reduction.name == "mean", rows.dtype)
    return (reduction.lse_square_scale * share * rows.sum(dim=1)).to(lse.dtype)


@linear_cross_entropy.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *_, heads, _scale, reduction, _padding_idx, _accumulate_dtype, needs, predict, chunked, _backend = options
    made = [chunked and need for need in needs]
    found = fake_losses(Head(hidden_states, weight, target, bias), heads, reduction, made)
    return *found, target.new_empty(hidden_states.shape[0] if predict else 0, dtype=torch.int64)


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
    class_weight: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed gradients of Σ grad_loss·loss + Σ grad_lse·lse (else empty); ``lse=None``: it was not saved."""
    head = Head(hidden_states, weight, target, bias)
    rule = rule_of(hidden_states, class_weight, ignore_index, label_smoothing, softcap, gradient_filter)
    wanted, kernels = Wanted.of(needs, accumulate_dtype), operation.kernels(backend, hidden_states, weight)
    reduced = Reduction(heads, lse_square_scale, reduction, padding_idx)
    upstream = _row_gradients(kernels, grad_loss, head, rule, reduced)
    upstream = upstream._replace(grad_lse=None if grad_lse is None else grad_lse.contiguous())
    with without_autocast(hidden_states.device.type):
        if lse is None:
            *_, gradients = kernels.forward_backward(upstream, head, rule, wanted)
        else:
            gradients = kernels.backward(upstream.at(lse, target, ignore_index), head, lse, rule, wanted)
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
    class_weight: Tensor | None,
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
) -> None:
    """Turn the gradients of Σ loss, made in the forward pass, into those of Σ grad_loss·loss, in place."""
    head = Head(hidden_states, weight, target, bias)
    rule = rule_of(hidden_states, class_weight, ignore_index, label_smoothing, softcap, gradient_filter)
    kernels = operation.kernels(backend, hidden_states, weight)
    of_losses = Reduction(heads, lse_square_scale, reduction, None)
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

    ignore_index: int
    label_smoothing: float
    softcap: float
    gradient_filter: float
    heads: int
    lse_square_scale: float
    reduction: str
    padding_idx: int | None
    accumulate_dtype: torch.dtype
    needs: list[bool]


def save(
    ctx: Any, head: Head, class_weight: Tensor | None, found: Losses, context: Context, chunked: bool, backend: str
) -> None:
    """*Chunked* keeps the gradients that it made, *streaming* the log-sum-exp."""
    ctx.save_for_backward(*head, class_weight, *(found[2:] if chunked else (found.lse,)))
    ctx.context, ctx.chunked, ctx.backend, ctx.made_used = context, chunked, backend, False
    ctx.set_materialize_grads(False)


def gradients_of(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> Gradients:
    """Those of hidden states, weight and bias, from what :func:`save` kept."""
    if grad_loss is None and grad_lse is None:
        return _NO_GRADIENTS
    hidden_states, weight, target, bias, class_weight, *kept = ctx.saved_tensors
    head, options = (hidden_states, weight, target, bias), (class_weight, *ctx.context, ctx.backend)
    arguments: Any
    if ctx.chunked and grad_loss is not None and grad_lse is None and not ctx.made_used and may_scale_in_place():
        ctx.made_used = True
        # .data: scaled under another version counter, since a second backward pass unpacks but does not use them
        made = (kept[0].data, kept[1].data, kept[2].data)
        arguments = (*made, grad_loss, *head, *options)
        linear_cross_entropy_rescale_(*arguments)
    else:
        arguments = (grad_loss, grad_lse, *head, None if ctx.chunked else kept[0], *options)
        made = linear_cross_entropy_backward(*arguments)
    return _needed(made, ctx.context.needs)


@linear_cross_entropy.register_formula("linear_cross_entropy")
class _Formula(Formula):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], hidden_states: Tensor, weight: Tensor, target: Tensor,
        bias: Tensor | None, class_weight: Tensor | None, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = Head(hidden_states, weight, target, bias)
        *found, predicted = run(*head, class_weight, *options)
        made = Losses(*found)
        *context, _predict, chunked, backend = options
        save(ctx, head, class_weight, made, Context(*context), chunked, backend)
        ctx.mark_non_differentiable(made.grad_hidden_states, made.grad_weight, made.grad_bias, predicted)
        return *made, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias = gradients_of(ctx, grad_loss, grad_lse)
        options = (None,) * (len(Context._fields) + 4)  # and class_weight, predict, chunked, backend
        return None, hidden_states, weight, None, bias, *options


def _needed(made: tuple[Tensor, Tensor, Tensor], needs: list[bool]) -> Gradients:
    (hidden_states, weight, bias), (of_hidden, of_weight, of_bias) = made, needs
    return Gradients(hidden_states if of_hidden else None, weight if of_weight else None, bias if of_bias else None)


def _row_gradients(
    kernels: Kernels, grad_loss: Tensor | None, head: Head, rule: LossRule, reduction: Reduction
) -> Upstream:
    """Each (N,), from (K, M) or (K,); one value expanded where it serves every row."""
    heads, lse_square_scale, name, _ = reduction
    positions, mean = head.target.shape[0], name == "mean"
    if grad_loss is None:
        dtype = arithmetic_dtype(head.hidden_states)
        return Upstream(head.hidden_states.new_zeros((), dtype=dtype).expand(heads * positions))
    of_rows = partial(_of_rows, heads=heads, positions=positions)
    of_loss = of_rows(grad_loss * kernels.share(head, rule, True) if mean else grad_loss)
    if not lse_square_scale:
        return Upstream(of_loss)
    share = z_loss_share(head.target, rule.ignore_index, mean, grad_loss.dtype)
    return Upstream(of_loss, None, of_rows(lse_square_scale * share * grad_loss))


def _of_rows(of_losses: Tensor, heads: int, positions: int) -> Tensor:
    if of_losses.dim() == 2:
        return of_losses.reshape(-1)
    return of_losses.expand(positions) if heads == 1 else of_losses[:, None].expand(heads, positions).reshape(-1)


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
