"""The contrastive loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from repdeg_fast import functional
from repdeg_fast.functional.contrastive import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ContrastiveLoss(nn.Module):
    """:func:`repdeg_fast.contrastive_loss` with its options kept: InfoNCE over a batch without its N × N matrix.

    Example::

        loss = ContrastiveLoss(scale=20.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
        loss(encoder(questions), encoder(answers)).backward()

    Raises:
        ValueError: an option that the function refuses.
    """

    def __init__(
        self,
        scale: float = 20.0,
        similarity: str = "cosine",
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        false_negative_margin: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_options(scale, similarity, directions, partition_mode, hardness_mode, hardness_strength, reduction)
        self.scale, self.similarity = scale, similarity
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self.false_negative_margin, self.reduction = false_negative_margin, reduction

    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        *,
        query_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        positive: Tensor | None = None,
        all_queries: Tensor | None = None,
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> Tensor:
        """A scalar, or (N,) without reduction. ``queries`` (N, d), ``documents`` (N·(1 + H), d): the positives, then
        blocks of hard negatives."""
        return functional.contrastive_loss(
            queries, documents, scale=self.scale, similarity=self.similarity, directions=self.directions,
            partition_mode=self.partition_mode, hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength, query_ids=query_ids, document_ids=document_ids,
            false_negative_margin=self.false_negative_margin, positive=positive, all_queries=all_queries,
            reduction=self.reduction, group=group, exchange=exchange,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = ("scale", "similarity", "directions", "partition_mode", "hardness_mode", "hardness_strength")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
