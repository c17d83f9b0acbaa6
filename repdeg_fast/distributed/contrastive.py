"""The contrastive loss of a batch that ranks share: each rank's queries against the documents of all.

*Gathered*, every rank holds all columns, and the kernels of one device do the rest. *Round the ring*, documents are
passed from rank to rank: a block of columns is a part of a vocabulary whose cross entropy the queries have, with the
block at home that has their targets. In the backward pass the blocks go round once more, and their gradients with them.

The loss is that of the whole batch on every rank. Gradients are those of the whole batch's loss times the number of
ranks, which averaging over ranks (DistributedDataParallel, FSDP) undoes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repdeg_fast import _ranks, backends
from repdeg_fast._arithmetic import arithmetic_dtype, autocast_dtype, without_autocast
from repdeg_fast._checks import check_floating
from repdeg_fast.contracts.linear_cross_entropy import Head, LossRule, Upstream, Wanted
from repdeg_fast.distributed.debug import check_same
from repdeg_fast.distributed.shards import check_group, on_device
from repdeg_fast.ops.chunked_scores import EPS, inverse_norms
from repdeg_fast.ops.linear_cross_entropy import operation

IGNORED = -100


class Sizes(NamedTuple):
    """Of the batch that ranks share."""

    queries: list[int]  # of each rank
    blocks: int  # 1 + H, documents a query
    rank: int
    group: Any

    @property
    def whole(self) -> int:
        return sum(self.queries)

    @property
    def first(self) -> int:
        """The number of this rank's first query."""
        return sum(self.queries[: self.rank])


@torch.compiler.disable
def contrastive_loss(queries: Tensor, documents: Tensor, group: Any, exchange: str, **options: Any) -> Tensor:
    """:func:`repdeg_fast.contrastive_loss` of all ranks' batches."""
    for name in ("positive", "all_queries"):
        if options.pop(name) is not None:
            raise ValueError(f"{name}: expected None beside group, which says where the other ranks' queries are")
    reduction = options.pop("reduction")
    sizes = _sizes(queries, documents, group)
    told = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    check_same(group, "contrastive_loss", exchange=exchange, reduction=reduction, dtype=queries.dtype, **told)
    own = (_ring if exchange == "ring" else _gathered)(queries, documents, sizes, options)
    if reduction == "none":
        return own
    ranks, count = len(sizes.queries), sizes.whole if reduction == "mean" else 1
    mine = (own.sum(dtype=torch.float64) * (ranks / count)).to(own.dtype)
    total = own.detach().sum(dtype=torch.float64) / count
    distributed.all_reduce(total, group=group)
    return mine + (total.to(own.dtype) - mine).detach()


def _sizes(queries: Tensor, documents: Tensor, group: Any) -> Sizes:
    """What all ranks have: mistakes are errors on each of them."""
    check_group(group)
    for name, matrix in (("queries", queries), ("documents", documents)):
        check_floating(name, matrix)
    shapes = _ranks.gathered([*_shape(queries), *_shape(documents)], queries.device, group)
    blocks = {rows // n if n and rows % n == 0 else -1 for n, _, rows, _ in shapes}
    if len(blocks) > 1 or min(blocks) < 1 or len({width for _, *widths in shapes for width in widths[::2]}) > 1:
        shown = ", ".join(f"({n}, {d}) and ({rows}, {e})" for n, d, rows, e in shapes)
        raise ValueError(
            "documents: expected the same multiple of the queries on all ranks, at least one query, and one width, got "
            f"queries and documents {shown}"
        )
    return Sizes([n for n, *_ in shapes], min(blocks), distributed.get_rank(group), group)


def _shape(matrix: Tensor) -> tuple[int, int]:
    return (matrix.shape[0], matrix.shape[1]) if matrix.dim() == 2 else (-1, -1)


def _gathered(queries: Tensor, documents: Tensor, sizes: Sizes, options: dict[str, Any]) -> Tensor:
    from repdeg_fast.functional import contrastive_loss as of_one_device

    for name, blocks in (("query_ids", 1), ("document_ids", sizes.blocks)):
        if options[name] is not None:
            options[name] = _gather_columns(options[name][:, None], blocks, sizes)[:, 0]
    others = (
        set(options["directions"]) != {"query_to_doc"} or options["hardness_mode"] or options["query_ids"] is not None
    )
    positive = torch.arange(sizes.queries[sizes.rank], device=queries.device) + sizes.first
    return of_one_device(
        queries, _gather_columns(documents, sizes.blocks, sizes), positive=positive, reduction="none",
        all_queries=_gather_columns(queries, 1, sizes) if others else None, **options,
    )  # fmt: skip


def _gather_columns(matrix: Tensor, blocks: int, sizes: Sizes) -> Tensor:
    """All ranks' rows, in blocks of one row a query."""
    n, width = sizes.queries[sizes.rank], matrix.shape[1]
    by_query = matrix.view(blocks, n, width).transpose(0, 1).reshape(n, blocks * width)
    whole: Tensor = _Gather.apply(by_query, sizes)
    return whole.view(sizes.whole, blocks, width).transpose(0, 1).reshape(blocks * sizes.whole, width)


class _Gather(torch.autograd.Function):
    """The rows of all ranks; backward, each rank gets what all of them have for its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sizes) -> Tensor:
        ctx.sizes = sizes
        most = max(sizes.queries)
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        whole = rows.new_empty(most * len(sizes.queries), rows.shape[1])
        distributed.all_gather_into_tensor(whole, padded, group=sizes.group)
        return torch.cat([part[:n] for part, n in zip(whole.split(most), sizes.queries, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sizes, most = ctx.sizes, max(ctx.sizes.queries)
        padded = grad.new_zeros(len(sizes.queries), most, grad.shape[1])
        for part, rows in zip(padded, grad.split(sizes.queries), strict=True):
            part[: len(rows)] = rows
        own = grad.new_empty(most, grad.shape[1])
        distributed.reduce_scatter_tensor(own, padded.flatten(0, 1), group=sizes.group)
        return own[: sizes.queries[sizes.rank]], None


def _ring(queries: Tensor, documents: Tensor, sizes: Sizes, options: dict[str, Any]) -> Tensor:
    scale, similarity = options["scale"], options["similarity"]
    unserved = {
        "directions": set(options["directions"]) != {"query_to_doc"},
        "hardness_mode": options["hardness_mode"] is not None and options["hardness_strength"] != 0,
        "query_ids": options["query_ids"] is not None,
        "document_ids": options["document_ids"] is not None,
        "false_negative_margin": options["false_negative_margin"] is not None,
    }
    if asked := [name for name, given in unserved.items() if given]:
        raise ValueError(f"{asked[0]}: not served with exchange='ring', whose ranks see no other block; use 'gather'")
    if queries.dtype != documents.dtype:
        raise TypeError(f"documents: expected {queries.dtype} like queries, got {documents.dtype}")
    if (autocast := autocast_dtype(queries.device)) is not None and queries.dtype != torch.float64:
        queries, documents = queries.to(autocast), documents.to(autocast)
    if similarity == "cosine":
        queries, documents = _Unit.apply(queries), _Unit.apply(documents)
    loss: Tensor = _Ring.apply(queries * scale, documents, sizes, backends.requested())
    return loss


class _Unit(torch.autograd.Function):
    """x/max(‖x‖, eps). A zero row has a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = inverse_norms(x)
        ctx.save_for_backward(x, inverse)
        return (x * inverse[:, None]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, inverse = ctx.saved_tensors
        grad, unit = grad.to(inverse.dtype), x * inverse[:, None]
        along = torch.where(inverse >= 1 / EPS, 0, (grad * unit).sum(dim=1))
        return ((grad - along[:, None] * unit) * inverse[:, None]).to(x.dtype)


class _Ring(torch.autograd.Function):
    """ℓ of every query: its document is row r of the block at home."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, block: Tensor, sizes: Sizes, backend: str) -> Tensor:
        hidden_states, block = hidden_states.contiguous(), block.contiguous()
        ctx.save_for_backward(hidden_states, block)
        home = loss = lse = None
        with without_autocast(hidden_states.device.type), on_device(hidden_states):
            for step in range(len(sizes.queries)):
                passing = _PassedOn([block], sizes, step) if step + 1 < len(sizes.queries) else None
                kernels = operation.kernels(backend, hidden_states, block)
                head = Head(hidden_states, block, _targets(hidden_states, step), None)
                found, here = kernels.forward(head, LossRule(IGNORED, 0.0, 0.0))
                loss, home, lse = (found, here, here) if lse is None else (loss, home, torch.logaddexp(lse, here))
                if passing is not None:
                    (block,) = passing.arrived()
        ctx.lse, ctx.sizes, ctx.backend = lse, sizes, backend
        return loss + (lse - home)  # type: ignore[operator]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, block = ctx.saved_tensors
        wide, rule, sizes = arithmetic_dtype(hidden_states), LossRule(IGNORED, 0.0, 0.0), ctx.sizes
        wanted = Wanted.of([*ctx.needs_input_grad[:2], False], torch.float32)
        grad_hidden = torch.zeros_like(hidden_states, dtype=wide)
        grad_block, grad = torch.zeros_like(block, dtype=wide), grad.contiguous()
        nothing = torch.zeros_like(grad)
        with without_autocast(hidden_states.device.type), on_device(hidden_states):
            for step in range(len(sizes.queries)):
                head = Head(hidden_states, block, _targets(hidden_states, step), None)
                upstream = Upstream(nothing, grad) if step else Upstream(grad)
                kernels = operation.kernels(ctx.backend, hidden_states, block)
                made = kernels.backward(upstream, head, ctx.lse, rule, wanted)
                if made.hidden_states is not None:
                    grad_hidden += made.hidden_states
                if made.weight is not None:
                    grad_block += made.weight
                block, grad_block = _PassedOn([block, grad_block], sizes, step).arrived()
        made_hidden, made_block = grad_hidden.to(hidden_states.dtype), grad_block.to(block.dtype)
        return made_hidden, made_block if wanted.weight else None, None, None


def _targets(hidden_states: Tensor, step: int) -> Tensor:
    rows = hidden_states.shape[0]
    if step == 0:
        return torch.arange(rows, device=hidden_states.device)
    return torch.full((rows,), IGNORED, device=hidden_states.device)


class _PassedOn:
    """Send blocks to the next rank, and take those of the rank before, which came from ``step`` ranks further back."""

    def __init__(self, blocks: list[Tensor], sizes: Sizes, step: int) -> None:
        ranks, rank = len(sizes.queries), sizes.rank
        arriving = sizes.queries[(rank - step - 1) % ranks] * sizes.blocks
        self.received = [block.new_empty(arriving, block.shape[1]) for block in blocks]
        peer = lambda r: distributed.get_global_rank(sizes.group, r % ranks) if sizes.group else r % ranks  # noqa: E731
        if ranks == 1:
            self.received, self.works = blocks, []
            return
        operations = []
        for sent, received in zip(blocks, self.received, strict=True):
            operations += [
                distributed.P2POp(distributed.isend, sent.contiguous(), peer(rank + 1), sizes.group),
                distributed.P2POp(distributed.irecv, received, peer(rank - 1), sizes.group),
            ]
        self.works, self.kept = distributed.batch_isend_irecv(operations), blocks

    def arrived(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received
