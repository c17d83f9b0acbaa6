"""The row pass of the contrastive loss: products of rows and columns from one GEMM to the gradient of their
similarities for the next two. Mathematics: repdeg_fast/reference/contrastive.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .tile import add_exponentials, origin
from .tuning import choose, padded_columns, padded_vector

if TYPE_CHECKING:
    from repdeg_fast.contracts.contrastive import BlockRule, Ids, ScoreBlock


@dataclass(frozen=True)
class RowBlock:
    """``columns`` scores of a row a step."""

    columns: int
    num_warps: int


# 16 scores a thread: several 16-byte loads in flight; with all options 32 would spill
_BLOCKS = (RowBlock(4096, 8), RowBlock(2048, 4), RowBlock(8192, 16))


# The logits of some columns of one row; as the reference orders what masks and what scales.
@triton.jit
def _logits(
    scores, columns, scale, at, first_own, threshold, query_id, document_id, column_scale, query_ids, document_ids,
    columns_with_queries, columns_with_documents, last, width, positive_factor, own_factor, period,
    COSINE: tl.constexpr, THRESHOLD: tl.constexpr, QUERIES: tl.constexpr, DOCUMENTS: tl.constexpr, OWN: tl.constexpr,
    MASK_OWN: tl.constexpr, PERIODIC: tl.constexpr,
):  # fmt: skip
    z = tl.load(scores + columns, mask=columns < width, other=0.0).to(tl.float32) * scale
    if COSINE:
        z *= tl.load(column_scale + columns, mask=columns < width, other=0.0)
    positive = z * positive_factor
    if THRESHOLD:
        z = tl.where(z > threshold, -float("inf"), z)
    if QUERIES:
        same = tl.load(query_ids + columns, mask=columns < columns_with_queries, other=0) == query_id
        z = tl.where(same & (columns < columns_with_queries), -float("inf"), z)
    if DOCUMENTS:
        same = tl.load(document_ids + columns, mask=columns < columns_with_documents, other=0) == document_id
        z = tl.where(same & (columns < columns_with_documents), -float("inf"), z)
    if OWN:
        own = columns == first_own
        if PERIODIC:
            own = (columns >= first_own) & ((columns - first_own) % period == 0)
        if not MASK_OWN:
            z = tl.where(own, z * own_factor, z)
    z = tl.where(columns == at, positive, z)
    if OWN:
        if MASK_OWN:
            z = tl.where(own, -float("inf"), z)
    return tl.where(columns < last, z, -float("inf"))


# A row of products to their gradient, in place. It must be read once and written once: the second read finds the row
# (64 KB at W = 32,768 in bf16) in L2. `width` is W = `last` with the padding behind it, which is written too.
@triton.jit
def _rows_kernel(
    scores, origins, totals, row_scale, column_scale, positive, own, thresholds, row_query_ids, column_query_ids,
    row_document_ids, column_document_ids, grad_loss,
    columns_with_queries, columns_with_documents, last, width, row_stride, period,
    multiplier, slope, positive_factor, own_factor,
    COSINE: tl.constexpr, THRESHOLD: tl.constexpr, QUERIES: tl.constexpr, DOCUMENTS: tl.constexpr, OWN: tl.constexpr,
    MASK_OWN: tl.constexpr, PERIODIC: tl.constexpr, KNOWN: tl.constexpr, GRADIENT: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    scores += row.to(tl.int64) * row_stride
    block = tl.arange(0, BLOCK)
    at = tl.load(positive + row).to(tl.int32)
    of_row = 1.0
    first_own, threshold, query_id, document_id = -1, 0.0, 0, 0
    if COSINE:
        of_row = tl.load(row_scale + row)
    if OWN:
        first_own = tl.load(own + row).to(tl.int32)
    if THRESHOLD:
        threshold = tl.load(thresholds + row)
    if QUERIES:
        query_id = tl.load(row_query_ids + row)
    if DOCUMENTS:
        document_id = tl.load(row_document_ids + row)
    scale = of_row * multiplier
    if KNOWN:
        zero = tl.load(origins + row)
        total = tl.load(totals + row)
    else:
        most = -float("inf")
        total = 0.0
        for first in range(0, last, BLOCK):
            z = _logits(
                scores, first + block, scale, at, first_own, threshold, query_id, document_id, column_scale,
                column_query_ids, column_document_ids, columns_with_queries, columns_with_documents, last, width,
                positive_factor, own_factor, period, COSINE, THRESHOLD, QUERIES, DOCUMENTS, OWN, MASK_OWN, PERIODIC,
            )  # fmt: skip
            z, most, total = add_exponentials(z, most, total)
        zero = origin(most)
        tl.store(origins + row, zero)
        tl.store(totals + row, total)
    if GRADIENT:
        upstream = tl.load(grad_loss + row) * slope * of_row
        inverse = 1 / total
        for first in range(0, last, BLOCK):
            columns = first + block
            z = _logits(
                scores, columns, scale, at, first_own, threshold, query_id, document_id, column_scale,
                column_query_ids, column_document_ids, columns_with_queries, columns_with_documents, last, width,
                positive_factor, own_factor, period, COSINE, THRESHOLD, QUERIES, DOCUMENTS, OWN, MASK_OWN, PERIODIC,
            )  # fmt: skip
            gradient = tl.exp(z - zero) * inverse
            if TARGET:
                gradient -= tl.where(columns == at, 1.0, 0.0)
            gradient *= upstream
            if COSINE:
                gradient *= tl.load(column_scale + columns, mask=columns < width, other=0.0)
            tl.store(scores + columns, gradient.to(scores.dtype.element_ty), mask=columns < width)


def rows(block: ScoreBlock, rule: BlockRule) -> None:
    """See the contract. Where rows are padded to a multiple of 16 columns or more, the padding up to there is
    overwritten."""
    scores, width = block.scores, padded_columns(block.scores)
    query_ids, document_ids = _pair(block.query_ids), _pair(block.document_ids)
    column_scale = padded_vector(block.column_scale, width)
    size = choose("contrastive.rows", _BLOCKS, scores, columns=scores.shape[1])
    _rows_kernel[(len(scores),)](
        scores, block.origin, block.total, block.row_scale, column_scale, block.positive, block.own,
        block.threshold, *query_ids, *document_ids, block.grad_loss,
        _length(query_ids[1]), _length(document_ids[1]), scores.shape[1], width, scores.stride(0), rule.period,
        rule.multiplier, rule.slope, rule.positive_factor, rule.own_factor,
        COSINE=column_scale is not None, THRESHOLD=block.threshold is not None, QUERIES=query_ids[0] is not None,
        DOCUMENTS=document_ids[0] is not None, OWN=block.own is not None, MASK_OWN=rule.own_factor == 0,
        PERIODIC=rule.period != 0, KNOWN=rule.softmax_known, GRADIENT=block.grad_loss is not None,
        TARGET=rule.has_target, BLOCK=size.columns, num_warps=size.num_warps,
    )  # fmt: skip


def _pair(ids: Ids | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if ids is None else (ids.rows, ids.columns)


def _length(ids: Tensor | None) -> int:
    return 0 if ids is None else len(ids)
