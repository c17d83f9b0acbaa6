"""The contract of the contrastive loss. Mathematics: :mod:`repdeg_fast.reference.contrastive`.

Two levels, as in the linear cross entropy. The operator calls :class:`Kernels`, which
:mod:`repdeg_fast.ops.chunked_scores` makes from :class:`RowKernels`: a backend's, which know one block of scores.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Products

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")


class Batch(NamedTuple):
    """R rows, each a query with the column of its positive document."""

    queries: Tensor  # (R, d)
    documents: Tensor | None  # (W, d), W = C·(1 + H): those of query c are c, c + C, c + 2C, ...; None: the queries
    all_queries: Tensor | None  # (C, d), of which row r is number positive[r]; None: the rows are all there are
    positive: Tensor  # (R,), int64
    excluded: Tensor | None  # (R,), int64: one more document that the row does not meet
    query_ids: Tensor | None  # (C,), int64
    document_ids: Tensor | None  # (W,), int64
    groups: int  # C; 0 where it is not known, nor needed


class LossRule(NamedTuple):
    scale: float
    cosine: bool  # else dot products
    directions: tuple[str, ...]  # some of DIRECTIONS, in their order, the first always
    joint: bool  # one softmax over all directions, else the mean of one loss each
    hardness_mode: str | None
    hardness_strength: float
    margin: float | None


class Wanted(NamedTuple):
    """Which gradients to make."""

    queries: bool
    documents: bool
    all_queries: bool


class Gradients(NamedTuple):
    """Each in the dtype of what it belongs to; ``None``: not wanted."""

    queries: Tensor | None
    documents: Tensor | None
    all_queries: Tensor | None


class Kernels(Protocol):
    def forward(self, batch: Batch, rule: LossRule) -> Tensor:
        """ℓ of every row, (R,)."""

    def forward_backward(
        self, grad_loss: Tensor, batch: Batch, rule: LossRule, wanted: Wanted
    ) -> tuple[Tensor, Gradients]:
        """ℓ, and the gradients of Σ grad_loss·ℓ, grad_loss (R,)."""


class Ids(NamedTuple):
    """A row does not meet the columns that have its id."""

    rows: Tensor  # (R,), int64
    columns: Tensor  # of the first columns, int64


class ScoreBlock(NamedTuple):
    """Products of R rows with the W columns of one direction, and what belongs to them. A logit is

        product · (row_scale · multiplier) · column_scale

    and −∞ at columns that are masked: by ids, above the row's threshold, or where `own_factor` is 0 the own ones. The
    positive is never masked but as an own one.
    """

    scores: Tensor  # (R, W); with grad_loss turned to their gradient, else left as they are
    origin: Tensor  # (R,), the softmax of a row is exp(logit − origin)/total
    total: Tensor  # (R,)
    row_scale: Tensor | None  # (R,)
    column_scale: Tensor | None  # (W,)
    positive: Tensor  # (R,), int64
    own: Tensor | None  # (R,), int64: the first of a row's own columns
    threshold: Tensor | None  # (R,)
    query_ids: Ids | None
    document_ids: Ids | None
    grad_loss: Tensor | None  # (R,)


class BlockRule(NamedTuple):
    multiplier: float
    slope: float  # the logit's derivative in the similarity
    positive_factor: float  # of the positive's logit
    own_factor: float  # of the logits of the other own columns; 0 masks all of these
    period: int  # from one own column to the next; 0: there is one
    softmax_known: bool  # origin and total are read, not written
    has_target: bool  # the positive is what the loss wants, not one more column


class RowKernels(Products, Protocol):
    """The row kernel of a backend, and its products."""

    def rows(self, block: ScoreBlock, rule: BlockRule) -> None:
        """See :class:`ScoreBlock`."""
