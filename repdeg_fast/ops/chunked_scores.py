"""The contrastive loss as the library's products around a backend's row kernel, on one reused buffer of scores.

A chunk of rows meets all columns of all directions, side by side in the buffer: scores = rows · columnsᵀ, the row
kernel turns them into their gradient in place, and this times columns and rows is what goes to rows and columns.

All products take the vectors as they are given. That cosines are meant is in the row kernel alone, which scales rows
and columns by 1/‖x‖ on the way in and on the way out: Σ_b ∂/∂s(a, b)/(‖a‖‖b‖)·b is ∂â/‖a‖, for a row a and by the
transpose for a column, so that contributions of either kind are summed in one place, and at the end have their part
along x taken away. No normalized copy is made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.contracts.contrastive import (
    Batch,
    BlockRule,
    Gradients,
    Ids,
    LossRule,
    RowKernels,
    ScoreBlock,
    Wanted,
)
from repdeg_fast.ops import buffers
from repdeg_fast.ops.chunked_logits import FEWEST_ROWS
from repdeg_fast.ops.products import Sum, operand, operand_dtype

EPS = 1e-12  # a shorter vector is divided by this, as F.normalize does
BLOCK = 1024  # vectors whose gradient is taken off its radial part at a time


class ChunkedScores:
    """The operation's ``Kernels`` from a backend's ``RowKernels``."""

    def __init__(self, kernels: RowKernels) -> None:
        self.kernels = kernels

    def forward(self, batch: Batch, rule: LossRule) -> Tensor:
        return self._over_rows(None, batch, rule, Wanted(False, False, False))[0]

    def forward_backward(
        self, grad_loss: Tensor, batch: Batch, rule: LossRule, wanted: Wanted
    ) -> tuple[Tensor, Gradients]:
        return self._over_rows(grad_loss, batch, rule, wanted)

    def _over_rows(
        self, grad_loss: Tensor | None, batch: Batch, rule: LossRule, wanted: Wanted
    ) -> tuple[Tensor, Gradients]:
        directions, sides = _directions(self.kernels, batch, rule, wanted)
        queries, n = batch.queries, len(batch.queries)
        dtype, width = operand_dtype(queries), directions[-1].last
        step = _chunk_rows(n, width, directions, dtype)
        memory = buffers.take(self.kernels, queries, step, width, dtype)
        buffer = buffers.matrix(queries, step, width, dtype, memory)
        loss = queries.new_empty(n, dtype=arithmetic_dtype(queries))
        for chunk in (slice(*ends) for ends in buffers.ranges(n, step)):
            parts = [_Part(direction, buffer, chunk, batch.positive[chunk]) for direction in directions]
            for part in parts:
                self.kernels.multiply(part.scores, part.rows, part.direction.columns.values.t(), False)
            upstream = None if grad_loss is None else grad_loss[chunk]
            loss[chunk] = self._softmaxes(parts, batch, rule, upstream)
            if grad_loss is not None:
                for part in parts:
                    part.add_to_rows(self.kernels)
                    part.direction.columns.add(part.scores.t(), part.rows)
        if grad_loss is not None:
            buffers.keep(memory)
        return loss, Gradients(*[None if side is None else side.finished() for side in sides])

    def _softmaxes(self, parts: list[_Part], batch: Batch, rule: LossRule, upstream: Tensor | None) -> Tensor:
        """ℓ of the chunk's rows; with ``upstream``, scores turn to their gradient."""
        groups = [parts] if rule.joint else [[part] for part in parts]
        if upstream is not None:
            upstream = (upstream / len(groups)).contiguous()
        thresholds = _thresholds(parts, rule.margin)
        losses = []
        for group in groups:
            target = group[0].positive_logit() * group[0].rule.positive_factor
            blocks = [part.block(batch, thresholds[part.direction.name]) for part in group]
            if len(group) == 1:
                self.kernels.rows(blocks[0]._replace(grad_loss=upstream), group[0].rule)
                origin, total = blocks[0].origin, blocks[0].total
            else:
                origin, total = self._one_softmax(blocks, group, upstream)
            losses.append(total.log() + (origin - target))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)

    def _one_softmax(
        self, blocks: list[ScoreBlock], parts: list[_Part], upstream: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of several directions: first what each one sums to, then the gradients."""
        for block, part in zip(blocks, parts, strict=True):
            self.kernels.rows(block, part.rule)
        origins, totals = (torch.stack(vectors) for vectors in zip(*[(b.origin, b.total) for b in blocks], strict=True))
        counted = totals > 0  # a direction that masks all of a row has origin 0, which may be far from the others
        origin = origins.masked_fill(totals == 0, -math.inf).amax(0)
        total = torch.where(counted, totals * (origins - origin).exp(), totals).sum(0)
        if upstream is not None:
            for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
                known = part.rule._replace(softmax_known=True, has_target=i == 0)
                self.kernels.rows(block._replace(origin=origin, total=total, grad_loss=upstream), known)
        return origin, total


class _Side:
    """One matrix of vectors: as the products take it, its inverse norms, and the sum that becomes its gradient."""

    def __init__(self, kernels: RowKernels, vectors: Tensor, cosine: bool, wanted: bool) -> None:
        self.vectors, self.values = vectors, operand(vectors, operand_dtype(vectors))
        self.inverse_norm = inverse_norms(vectors) if cosine else None
        gradient = torch.empty_like(vectors, memory_format=torch.contiguous_format) if wanted else None
        self.sum = Sum(kernels, gradient, arithmetic_dtype(vectors), 2)
        if self.sum.total is not None:
            self.sum.total.zero_()

    def add(self, a: Tensor, b: Tensor, part: slice = slice(None)) -> None:
        if self.sum.total is not None:
            self.sum.add(a, b, False, part)

    def finished(self) -> Tensor | None:
        if self.sum.total is not None and self.inverse_norm is not None:
            remove_radial_(self.sum.total, self.vectors, self.inverse_norm)
        self.sum.finish()
        return self.sum.gradient


class _Direction(NamedTuple):
    name: str
    rows: _Side
    rows_by_positive: bool  # row r is vector positive[r] of its side, else r
    columns: _Side
    first: int  # of the buffer's columns
    last: int
    rule: BlockRule


class _Part:
    """A chunk of one direction."""

    def __init__(self, direction: _Direction, buffer: Tensor, chunk: slice, positive: Tensor) -> None:
        self.direction, self.rule, self.chunk, self.positive = direction, direction.rule, chunk, positive
        self.index = positive if direction.rows_by_positive else chunk
        self.rows = direction.rows.values[self.index]
        self.scores = buffer[: len(self.rows), direction.first : direction.last]
        inverse_norm = direction.rows.inverse_norm
        self.row_scale = None if inverse_norm is None else inverse_norm[self.index]

    def positive_logit(self) -> Tensor:
        """(R,), before the row kernel and without its factor; multiplied in its order, to be its bits."""
        dtype = arithmetic_dtype(self.direction.rows.vectors)
        product = self.scores.gather(1, self.positive[:, None])[:, 0].to(dtype)
        if self.row_scale is None or self.direction.columns.inverse_norm is None:
            return product * self.rule.multiplier
        return product * (self.row_scale * self.rule.multiplier) * self.direction.columns.inverse_norm[self.positive]

    def block(self, batch: Batch, threshold: Tensor | None) -> ScoreBlock:
        name, positive, width = self.direction.name, self.positive, self.scores.shape[1]
        own = None if self.rule.own_factor == 1 else positive
        if name == "query_to_doc" and batch.excluded is not None:
            own = batch.excluded[self.chunk]
        dtype = arithmetic_dtype(self.direction.rows.vectors)
        origin, total = (self.scores.new_empty(len(positive), dtype=dtype) for _ in range(2))
        return ScoreBlock(
            self.scores, origin, total, self.row_scale, self.direction.columns.inverse_norm, positive, own,
            threshold, _ids(batch.query_ids, positive, width), _ids(batch.document_ids, positive, width), None,
        )  # fmt: skip

    def add_to_rows(self, kernels: RowKernels) -> None:
        side, columns = self.direction.rows, self.direction.columns.values
        if isinstance(self.index, slice):
            side.add(self.scores, columns, self.index)
        elif side.sum.total is not None:
            product = torch.empty_like(self.rows)
            kernels.multiply(product, self.scores, columns, False)
            # deterministic also on a GPU, as index_add_ is not
            side.sum.total.index_put_((self.index,), product.to(side.sum.total.dtype), accumulate=True)


def _thresholds(parts: list[_Part], margin: float | None) -> dict[str, Tensor | None]:
    """By direction: logits above are not those of negatives. The positive is that of the first, also elsewhere."""
    if margin is None:
        return {part.direction.name: None for part in parts}
    positive, first = parts[0].positive_logit(), parts[0].rule.multiplier
    factors = {part.direction.name: part.rule.multiplier for part in parts}
    return {name: positive * (factor / first) + margin * factor for name, factor in factors.items()}


def inverse_norms(vectors: Tensor) -> Tensor:
    """1/‖x‖ of every row, 0 for a zero row; NaN where the square overflows, which must not look like one."""
    norm = torch.linalg.vector_norm(vectors, dim=1, dtype=arithmetic_dtype(vectors))
    inverse = torch.where(norm == 0, 0, 1 / norm.clamp_min(EPS))
    return inverse.masked_fill(norm.isinf(), math.nan)


def remove_radial_(gradient: Tensor, vectors: Tensor, inverse_norm: Tensor) -> None:
    """gradient −= (gradient·x̂) x̂, block by block; not where x̂ = x/eps is linear in x."""
    blocks = zip(*[tensor.split(BLOCK) for tensor in (gradient, vectors, inverse_norm)], strict=True)
    for g, x, inverse in blocks:
        x = x.to(g.dtype)
        along = torch.where(inverse >= 1 / EPS, 0, torch.linalg.vecdot(g, x) * inverse * inverse)
        g.addcmul_(x, along[:, None], value=-1)


def _directions(
    kernels: RowKernels, batch: Batch, rule: LossRule, wanted: Wanted
) -> tuple[list[_Direction], list[_Side | None]]:
    """What meets what, and the sides of queries, documents and all queries (None: there is none of its own)."""

    def side(vectors: Tensor | None, wants: bool) -> _Side | None:
        return None if vectors is None else _Side(kernels, vectors, rule.cosine, wants)

    queries = _Side(kernels, batch.queries, rule.cosine, wanted.queries)
    documents, all_queries = side(batch.documents, wanted.documents), side(batch.all_queries, wanted.all_queries)
    found: list[_Direction] = []
    first = 0
    for name in rule.directions:
        source, target = name.split("_to_")
        rows = queries if source == "query" else documents or queries
        columns = (all_queries or queries) if target == "query" else documents or queries
        last = first + len(columns.vectors)
        found.append(_Direction(name, rows, source == "doc", columns, first, last, _block_rule(name, batch, rule)))
        first += buffers.aligned(len(columns.vectors), operand_dtype(batch.queries))
    return found, [queries, documents, all_queries]


def _block_rule(name: str, batch: Batch, rule: LossRule) -> BlockRule:
    plain = BlockRule(rule.scale, rule.scale, 1.0, 1.0, 0, False, True)
    if name == "query_to_query":
        return plain._replace(own_factor=0.0)
    if name == "doc_to_doc":
        return plain._replace(own_factor=0.0, period=batch.groups)
    if name == "query_to_doc" and batch.excluded is not None:
        return plain._replace(own_factor=0.0)
    if name != "query_to_doc" or rule.hardness_mode is None:
        return plain
    penalized = rule.scale + rule.hardness_strength
    if rule.hardness_mode == "hard_negatives":  # the own ones alone; the positive, which is one of them, is set apart
        return plain._replace(own_factor=penalized / rule.scale, period=batch.groups)
    back = rule.scale / penalized
    if rule.hardness_mode == "all_negatives":
        return plain._replace(multiplier=penalized, positive_factor=back)
    return plain._replace(multiplier=penalized, positive_factor=back, own_factor=back, period=batch.groups)


def _ids(ids: Tensor | None, positive: Tensor, width: int) -> Ids | None:
    return None if ids is None else Ids(ids[positive], ids[:width])


def _chunk_rows(rows: int, width: int, directions: list[_Direction], dtype: torch.dtype) -> int:
    """How many rows are held at once: as many as the limit of the buffers allows, in chunks of about equal size."""
    vectors = directions[0].rows.vectors
    limit = buffers.limit(vectors) - 32 * rows - 8 * width  # positives, losses and norms
    copies = vectors.shape[1] * 4 * (torch.get_num_threads() - 1 if vectors.device.type == "cpu" else 0)
    copies += vectors.shape[1] * 2 * dtype.itemsize * any(direction.rows_by_positive for direction in directions)
    row_bytes = buffers.aligned(width, dtype) * dtype.itemsize + copies + 64
    chunks = max(1, -(-rows // max(limit // row_bytes, FEWEST_ROWS)))
    return -(-rows // chunks)
