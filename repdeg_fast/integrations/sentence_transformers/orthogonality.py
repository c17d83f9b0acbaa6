"""sentence-transformers' global orthogonal regularization without its N × N matrices."""

from __future__ import annotations

from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from torch import Tensor

from repdeg_fast.backends import forbid_if_strict
from repdeg_fast.functional import global_orthogonal_regularization


class GlobalOrthogonalRegularizationLoss(losses.GlobalOrthogonalRegularizationLoss):
    """sentence-transformers' loss of that name: same arguments, same dictionary of terms, same gradients, O(N·d²) where
    theirs is O(N²·d). With a ``similarity_fct`` other than ``cos_sim`` it is theirs.

    Example::

        loss = GlobalOrthogonalRegularizationLoss(model, aggregation="sum")
        terms = loss.compute_loss_from_embeddings([queries, documents])  # (N, d) each
    """

    def compute_gor(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms of (N, d) embeddings, without their weights; 0 for one whose weight is 0."""
        if self.similarity_fct is not cos_sim:
            forbid_if_strict("repdeg_fast: similarity_fct is not cos_sim: the regularization is not fused")
            return super().compute_gor(embeddings)
        mean, second_moment = global_orthogonal_regularization(
            embeddings,
            mean_weight=float(bool(self.mean_weight)),
            second_moment_weight=float(bool(self.second_moment_weight)),
            reduction="none",
        )
        return mean, second_moment
