"""The operators behind the contrastive loss. Mathematics: :mod:`repdeg_fast.reference.contrastive`.

The gradients of Σ loss are made in the forward pass where one number will scale them, and are what it saves. Where each
row has an upstream gradient of its own, in fp16, whose gradients underflow unless the loss scale is known, and when the
graph is run a second time, they are made in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.backends import Operation, no_float64, no_limit
from repdeg_fast.contracts.contrastive import (
    DIRECTIONS,
    Batch,
    BlockRule,
    Gradients,
    Kernels,
    LossRule,
    ScoreBlock,
    Wanted,
)
from repdeg_fast.native import contrastive as native
from repdeg_fast.ops._operator import Formula, may_scale_in_place, operator
from repdeg_fast.ops.chunked_scores import ChunkedScores
from repdeg_fast.ops.products import LibraryProducts
from repdeg_fast.reference import contrastive as reference


class _ReferenceRows(LibraryProducts):
    def rows(self, block: ScoreBlock, rule: BlockRule) -> None:
        reference.rows(block, rule)


def _triton() -> Kernels:
    from repdeg_fast.ops import triton_contrastive

    return ChunkedScores(triton_contrastive.RowKernels())


operation = Operation[Kernels](
    "contrastive",
    reference=ChunkedScores(_ReferenceRows()),
    native=lambda operators: ChunkedScores(native.RowKernels(operators)),
    triton=_triton,
    limits={"cpu": no_limit, "triton": no_float64},
)


class Found(NamedTuple):
    """What a forward pass returns; gradients that were not made are empty."""

    loss: Tensor  # () or, without reduction, (R,)
    grad_queries: Tensor
    grad_documents: Tensor
    grad_all_queries: Tensor


@operator()
def contrastive(
    queries: Tensor,
    documents: Tensor | None,
    all_queries: Tensor | None,
    positive: Tensor | None,
    excluded: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    groups: int,
    scale: float,
    cosine: bool,
    directions: list[bool],
    joint: bool,
    hardness_mode: str,
    hardness_strength: float,
    margin: float | None,
    reduction: str,
    made: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of Found. ``positive=None``: row r's is document r; ``made``: which gradients of Σ loss to make."""
    batch = _batch(queries, documents, all_queries, positive, excluded, query_ids, document_ids, groups)
    rule = _rule(scale, cosine, directions, joint, hardness_mode, hardness_strength, margin)
    kernels, gradients = operation.kernels(backend, *_vectors(batch)), Gradients(None, None, None)
    with torch.autocast(queries.device.type, enabled=False):
        if any(made):
            factor = _row_factor(len(queries), reduction)
            grad_loss = queries.new_full((1,), factor, dtype=arithmetic_dtype(queries)).expand(len(queries))
            rows, gradients = kernels.forward_backward(grad_loss, batch, rule, Wanted(*made))
        else:
            rows = kernels.forward(batch, rule)
    if reduction != "none":
        rows = rows.sum(dtype=torch.float64).mul_(_row_factor(len(rows), reduction)).to(rows.dtype)
    return Found(rows, *_filled(gradients, queries))


@contrastive.register_fake
def _(queries: Tensor, documents: Tensor | None, all_queries: Tensor | None, *options: Any) -> Found:
    *_, reduction, made, _backend = options
    shape = queries.shape[:1] if reduction == "none" else ()
    loss = queries.new_empty(shape, dtype=arithmetic_dtype(queries))
    return Found(loss, *_empty_gradients((queries, documents, all_queries), made))


@operator()
def contrastive_backward(
    grad_loss: Tensor,
    queries: Tensor,
    documents: Tensor | None,
    all_queries: Tensor | None,
    positive: Tensor | None,
    excluded: Tensor | None,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    groups: int,
    scale: float,
    cosine: bool,
    directions: list[bool],
    joint: bool,
    hardness_mode: str,
    hardness_strength: float,
    margin: float | None,
    reduction: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed gradients of Σ grad_loss·loss (else empty)."""
    batch = _batch(queries, documents, all_queries, positive, excluded, query_ids, document_ids, groups)
    rule = _rule(scale, cosine, directions, joint, hardness_mode, hardness_strength, margin)
    grad_rows = (grad_loss * _row_factor(len(queries), reduction)).expand(len(queries))
    with torch.autocast(queries.device.type, enabled=False):
        kernels = operation.kernels(backend, *_vectors(batch))
        _, gradients = kernels.forward_backward(grad_rows, batch, rule, Wanted(*needs))
    return _filled(gradients, queries)


@contrastive_backward.register_fake
def _(
    grad_loss: Tensor, queries: Tensor, documents: Tensor | None, all_queries: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs, _backend = options
    return _empty_gradients((queries, documents, all_queries), needs)


contrastive_backward.forbid_second_derivative("contrastive_loss")


@operator(mutates=("grad_queries", "grad_documents", "grad_all_queries"))
def contrastive_rescale_(
    grad_queries: Tensor, grad_documents: Tensor, grad_all_queries: Tensor, grad_loss: Tensor
) -> None:
    """Turn the gradients of Σ loss, made in the forward pass, into those of Σ grad_loss·loss, in place."""
    if grad_loss.device.type != "cpu" or grad_loss.item() != 1:  # on a GPU a look would stall the stream
        for gradient in (grad_queries, grad_documents, grad_all_queries):
            gradient.mul_(grad_loss)


@contrastive_rescale_.register_fake
def _(*_: Any) -> None:
    pass


@contrastive.register_formula("contrastive_loss")
class _Formula(Formula):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        found = Found(*run(*arguments))
        *tensors, ctx.options = *arguments[:7], arguments[7:]
        *_, made, _backend = ctx.options
        ctx.save_for_backward(*tensors, *(found[1:] if any(made) else ()))
        ctx.made_used = not any(made)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (4 + len(ctx.options))
        if grad_loss is None:
            return None, None, None, None, *nothing
        made = ctx.saved_tensors[7:]
        needs = list(ctx.needs_input_grad[1:4])
        if not ctx.made_used and may_scale_in_place():
            ctx.made_used = True
            # .data: scaled under another version counter, since a second backward pass unpacks but does not use them
            gradients = (made[0].data, made[1].data, made[2].data)
            contrastive_rescale_(*gradients, grad_loss)
        else:
            *options, _made, backend = ctx.options
            arguments: Any = (grad_loss, *ctx.saved_tensors[:7], *options, needs, backend)
            gradients = contrastive_backward(*arguments)
        return None, *(g if need else None for g, need in zip(gradients, needs, strict=True)), *nothing


def _batch(
    queries: Tensor, documents: Tensor | None, all_queries: Tensor | None, positive: Tensor | None, *rest: Any
) -> Batch:
    if positive is None:
        positive = torch.arange(len(queries), device=queries.device)
    return Batch(queries, documents, all_queries, positive, *rest)


def _rule(scale: float, cosine: bool, directions: list[bool], joint: bool, mode: str, *rest: Any) -> LossRule:
    names = tuple(name for name, chosen in zip(DIRECTIONS, directions, strict=True) if chosen)
    return LossRule(scale, cosine, names, joint, mode or None, *rest)


def _vectors(batch: Batch) -> list[Tensor]:
    return [x for x in (batch.queries, batch.documents, batch.all_queries) if x is not None]


def _row_factor(rows: int, reduction: str) -> float:
    return 1 / rows if reduction == "mean" else 1.0


def _empty_gradients(vectors: tuple[Tensor | None, ...], made: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    queries, documents, all_queries = [
        vectors[0].new_empty((0,)) if x is None or not wanted else x.new_empty(x.shape)  # type: ignore[union-attr]
        for x, wanted in zip(vectors, made, strict=True)
    ]
    return queries, documents, all_queries


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operators return tensors: an empty one for a gradient that is not made."""
    queries, documents, all_queries = [like.new_empty(0) if g is None else g for g in gradients]
    return queries, documents, all_queries
