"""The operators behind the linear cross entropy. Mathematics: :mod:`repdeg_fast.reference.linear_cross_entropy`.

*Chunked* makes the gradients of Σ_k loss_k in the forward pass and scales them in the backward pass; they are what it
saves. One scale serves them only if all K heads have the same upstream gradient, which a sum or a mean of the losses
gives. Otherwise, and when the graph is run a second time, the gradients are made again. *Streaming* saves the
log-sum-exp of every row and makes the gradients in the backward pass.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.backends import Operation, no_float64, no_limit
from repdeg_fast.native import build
from repdeg_fast.ops import _vocabulary_chunks
from repdeg_fast.ops._common import forbid_double_backward
from repdeg_fast.ops.gumbel_mix import Sample, empty_sample
from repdeg_fast.reference import linear_cross_entropy as reference
from repdeg_fast.reference.linear_cross_entropy import Gradients, arithmetic_dtype

operation = Operation[Any](
    "linear_cross_entropy",
    reference=reference,
    native=lambda namespace: build.operators(
        "linear_cross_entropy", *("rows", "multiply", "add", "advise"), namespace=namespace
    ),
    triton=lambda: importlib.import_module("repdeg_fast.triton_kernels.linear_cross_entropy"),
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


@torch.library.custom_op("repdeg_fast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden_states: Tensor,  # (N, d), N = K·M
    weight: Tensor,  # (V, d)
    target: Tensor,  # (M,)
    bias: Tensor | None,  # (V,)
    mixture_logits: Tensor | None,  # (M, K)
    seed: Tensor | None,
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
    """Loss (K,) or (K, M), log-sum-exp (N,) and, where `chunked`, the needed gradients of Σ loss (else empty).

    With `mixture_logits` and `seed` also a sample of the mixture, as ``gumbel_sample`` returns it (else empty): from
    the same logits where `chunked`, else in a sweep of its own. Not differentiable.
    """
    _check_target(target, len(weight), ignore_index)
    inputs, options = (hidden_states, weight, target, bias), (ignore_index, label_smoothing, softcap)
    gradients: Gradients = (None, None, None)
    factor = _row_factor(target, ignore_index, reduction, arithmetic_dtype(hidden_states))
    with torch.autocast(hidden_states.device.type, enabled=False):
        by_head = hidden_states.unflatten(0, (heads, len(target)))
        sample = Sample(by_head, mixture_logits, weight, bias, seed, temperature, backend)
        if chunked:
            forward_backward = _function("forward_backward", backend, hidden_states, weight)
            grad_loss = factor.expand(len(hidden_states))
            sampling = () if seed is None else (heads, sample.from_logits)
            rows, lse, gradients = forward_backward(grad_loss, *inputs, *options, needs, accumulate_dtype, *sampling)
        else:
            rows, lse = _function("forward", backend, hidden_states, weight)(*inputs, *options)
            if seed is not None:
                sample.from_hidden_states()
    rows = rows.view(heads, len(target))
    loss = rows.clone() if reduction == "none" else rows.double().sum(1).mul(factor).to(rows.dtype)
    return loss, lse, *_filled(gradients, hidden_states, padding_idx), sample.token_ids, sample.peak


@linear_cross_entropy.register_fake
def _(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    mixture_logits: Tensor | None,
    seed: Tensor | None,
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
    dtype = arithmetic_dtype(hidden_states)  # sizes by shape: len() would not do for symbolic ones
    loss = hidden_states.new_empty((heads, target.shape[0]) if reduction == "none" else (heads,), dtype=dtype)
    lse = hidden_states.new_empty(hidden_states.shape[0], dtype=dtype)
    gradients = _empty_gradients(hidden_states, weight, bias, [chunked and need for need in needs])
    return loss, lse, *gradients, *empty_sample(hidden_states, 0 if seed is None else target.shape[0])


@torch.library.custom_op("repdeg_fast::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad_loss: Tensor | None,  # (K,) or (K, M)
    grad_lse: Tensor | None,  # (N,)
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor | None,  # (N,); None: not saved
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
    """The needed gradients of Σ grad_loss·loss + Σ grad_lse·lse (else empty)."""
    inputs, options = (hidden_states, weight, target, bias), (ignore_index, label_smoothing, softcap)
    grad_rows = _row_gradients(grad_loss, target, heads, ignore_index, reduction, hidden_states)
    with torch.autocast(hidden_states.device.type, enabled=False):
        if lse is None and grad_lse is None:
            forward_backward = _function("forward_backward", backend, hidden_states, weight)
            *_, gradients = forward_backward(grad_rows, *inputs, *options, needs, accumulate_dtype)
        else:
            if lse is None:
                _, lse = _function("forward", backend, hidden_states, weight)(*inputs, *options)
            backward = _function("backward", backend, hidden_states, weight)
            grad_lse = None if grad_lse is None else grad_lse.contiguous()
            gradients = backward(grad_rows, grad_lse, *inputs, lse, *options, needs, accumulate_dtype)
    return _filled(gradients, hidden_states, padding_idx)


@linear_cross_entropy_backward.register_fake
def _(
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
    return _empty_gradients(hidden_states, weight, bias, needs)


@torch.library.custom_op(
    "repdeg_fast::linear_cross_entropy_rescale_", mutates_args={"grad_hidden", "grad_weight", "grad_bias"}
)
def linear_cross_entropy_rescale_(
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_loss: Tensor,  # (K,)
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
    inputs, options = (hidden_states, weight, target, bias), (ignore_index, label_smoothing, softcap)
    made = [g if need else None for g, need in zip((grad_hidden, grad_weight, grad_bias), needs, strict=True)]
    grad_rows = _row_gradients(grad_loss, target, heads, ignore_index, reduction, hidden_states)
    with torch.autocast(hidden_states.device.type, enabled=False):
        rescale_ = _function("rescale_", backend, hidden_states, weight)
        rescale_(made, grad_loss, grad_rows, *inputs, *options, needs, accumulate_dtype)
    if padding_idx is not None and needs[1]:
        grad_weight[padding_idx] = 0


@linear_cross_entropy_rescale_.register_fake
def _(*_: Any) -> None:
    pass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, target, bias, _, _, _, *ctx.options, ctx.chunked, ctx.backend = inputs
    _, lse, *gradients, token_ids, peak = output
    made = gradients if ctx.chunked else [lse]
    ctx.save_for_backward(hidden_states, weight, target, bias, *made)
    ctx.made_used = False
    ctx.mark_non_differentiable(*gradients, token_ids, peak)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden_states, weight, target, bias, *made = ctx.saved_tensors
    inputs = (hidden_states, weight, target, bias)
    rest = [None] * (len(ctx.options) + 5)  # mixture logits, seed, temperature; options; chunked, backend
    if grad_loss is None and grad_lse is None:
        return None, None, None, None, *rest
    # with gradients enabled (create_graph) the result must carry the error about second derivatives
    if ctx.chunked and grad_loss is not None and grad_lse is None and not ctx.made_used and not torch.is_grad_enabled():
        ctx.made_used = True
        # .data: scaled under another version counter, since a second backward pass unpacks but does not use them
        gradients = tuple(gradient.data for gradient in made)
        linear_cross_entropy_rescale_(*gradients, grad_loss, *inputs, *ctx.options, ctx.backend)
    else:
        lse = None if ctx.chunked else made[0]
        gradients = linear_cross_entropy_backward(grad_loss, grad_lse, *inputs, lse, *ctx.options, ctx.backend)
    needs = ctx.options[-1]
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, *rest


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
forbid_double_backward(linear_cross_entropy_backward, "linear_cross_entropy")


def _function(name: str, backend: str, hidden_states: Tensor, weight: Tensor) -> Callable[..., Any]:
    """``forward``, ``backward``, ``forward_backward`` or ``rescale_`` of the backend that serves this call: its own, or
    the GEMMs of :mod:`_vocabulary_chunks` around its row kernel."""
    kernels = operation.kernels(backend, hidden_states, weight)
    if hasattr(kernels, name):
        return getattr(kernels, name)
    return functools.partial(getattr(_vocabulary_chunks, name), kernels)


def _check_target(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Values are checked on the CPU only: on a GPU a check would stall the stream, and bad targets give NaN there."""
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"target: expected values from 0 to {vocabulary - 1}, or ignore_index ({ignore_index}), "
            f"got {target[wrong][0].item()}"
        )


def _row_factor(target: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """Upstream gradient of each counted row where that of each head's loss is 1, (); 1 where no row counts."""
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=target.device)
    return (target != ignore_index).sum().clamp_min(1).to(dtype).reciprocal()


def _row_gradients(
    grad_loss: Tensor | None, target: Tensor, heads: int, ignore_index: int, reduction: str, hidden_states: Tensor
) -> Tensor:
    """(N,), from (K, M) or (K,); one value expanded where it serves every row."""
    rows = (heads, len(target))
    if grad_loss is None:
        return hidden_states.new_zeros((), dtype=arithmetic_dtype(hidden_states)).expand(rows[0] * rows[1])
    if reduction == "none":
        return grad_loss.reshape(-1)
    per_head = grad_loss * _row_factor(target, ignore_index, reduction, grad_loss.dtype)
    return per_head.expand(rows[1]) if heads == 1 else per_head[:, None].expand(rows).reshape(-1)


def _empty_gradients(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden_states, weight, hidden_states if bias is None else bias)
    shapes = (hidden_states.shape, weight.shape, weight.shape[:1])
    grads = (t.new_empty(s if need else (0,)) for t, s, need in zip(like, shapes, needs, strict=True))
    grad_hidden, grad_weight, grad_bias = grads
    return grad_hidden, grad_weight, grad_bias


def _filled(gradients: Gradients, like: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Operators return tensors: an empty one for a gradient that is not needed. The padding row gets none."""
    grad_hidden, grad_weight, grad_bias = (like.new_empty(0) if g is None else g for g in gradients)
    if padding_idx is not None and grad_weight.numel():
        grad_weight[padding_idx] = 0
    return grad_hidden, grad_weight, grad_bias
