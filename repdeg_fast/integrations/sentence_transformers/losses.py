"""The ranking losses of sentence-transformers by :func:`repdeg_fast.contrastive_loss`.

They are subclasses that compute their loss in another way: constructors, datasets, model cards, encoding, gradient
caching and wrappers such as MatryoshkaLoss stay sentence-transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor, nn

from repdeg_fast._checks import check_finite
from repdeg_fast.backends import forbid_if_strict
from repdeg_fast.functional import contrastive_loss
from repdeg_fast.integrations.sentence_transformers.orthogonality import GlobalOrthogonalRegularizationLoss

Loss = TypeVar("Loss", bound=nn.Module)


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence-transformers' loss of that name without its matrices of scores: same arguments, values and gradients.

    A ``similarity_fct`` other than ``cos_sim`` and ``dot_score`` is computed as there.

    Args:
        model, ...: as there.
        false_negative_margin: documents more similar to the query than its own by more than this are no negatives.
    """

    false_negative_margin: float | None = None

    def __init__(self, *arguments: Any, false_negative_margin: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if false_negative_margin is not None:
            check_finite("false_negative_margin", false_negative_margin)
        self.false_negative_margin = false_negative_margin

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The mean loss of this rank's queries. ``embeddings``: (N, d) of queries, of their documents, and of hard
        negatives, a tensor each."""
        similarity = similarity_name(self.similarity_fct)
        if len(embeddings) < 2 or similarity is None:
            # the first is an error there; labels are not used
            return super().compute_loss_from_embeddings(embeddings, labels)  # type: ignore[arg-type]
        queries, *documents = embeddings
        n, all_queries, positive = len(queries), None, None
        if self.gather_across_devices:
            # a column is gathered before columns are joined: blocks of positives and negatives span all ranks
            all_queries = all_gather_with_grad(queries)
            documents = [all_gather_with_grad(column) for column in documents]
            positive = torch.arange(n, device=queries.device) + get_rank() * n
        elif n == 1:  # the last batch of an epoch
            all_queries, positive = queries, torch.zeros(1, dtype=torch.long, device=queries.device)
        return contrastive_loss(
            queries, torch.cat(documents), scale=self.scale, similarity=similarity, directions=self.directions,
            partition_mode=self.partition_mode, hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength, false_negative_margin=self.false_negative_margin,
            positive=positive, all_queries=all_queries,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        config, margin = super().get_config_dict(), self.false_negative_margin
        return config if margin is None else config | {"false_negative_margin": margin}


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' loss of that name: same arguments, values and gradients. Its loss stage goes in chunks of
    its own, whatever the encoder's ``mini_batch_size``."""

    loss: MultipleNegativesRankingLoss

    def __init__(self, *arguments: Any, false_negative_margin: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        apply(self.loss)
        if false_negative_margin is not None:
            check_finite("false_negative_margin", false_negative_margin)
        self.loss.false_negative_margin = false_negative_margin

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Of the embeddings of all mini-batches, a list a column; ``with_backward``: the gradients, too."""
        if similarity_name(self.similarity_fct) is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """As :meth:`MultipleNegativesRankingLoss.compute_loss_from_embeddings`."""
        return self.loss.compute_loss_from_embeddings(embeddings, labels)

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        margin = self.loss.false_negative_margin
        return config if margin is None else config | {"false_negative_margin": margin}


# the symmetric ones are the others with fixed directions
CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    losses.GlobalOrthogonalRegularizationLoss: GlobalOrthogonalRegularizationLoss,
    losses.MultipleNegativesRankingLoss: MultipleNegativesRankingLoss,
    losses.MultipleNegativesSymmetricRankingLoss: MultipleNegativesRankingLoss,
    losses.CachedMultipleNegativesRankingLoss: CachedMultipleNegativesRankingLoss,
    losses.CachedMultipleNegativesSymmetricRankingLoss: CachedMultipleNegativesRankingLoss,
}


def apply(loss: Loss) -> Loss:
    """Convert a loss of sentence-transformers in place, also one inside MatryoshkaLoss and other wrappers, and return
    it. Options stay as they are; subclasses of users are left alone.

    Raises:
        TypeError: not a module.
        ValueError: nothing to convert.
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss: expected a loss of sentence-transformers, a module, got {type(loss).__name__}")
    found = [module for module in loss.modules() if type(module) in (*CONVERTED, *CONVERTED.values())]
    if not found:
        names = ", ".join(sorted({kind.__name__ for kind in CONVERTED}))
        raise ValueError(f"loss: expected one of {names}, or a loss around one, got {type(loss).__name__}")
    for module in found:
        module.__class__ = CONVERTED.get(type(module), type(module))
        decorator = vars(module).get("calculate_loss")  # MatryoshkaLoss keeps the method that it found
        if getattr(getattr(decorator, "fn", None), "__self__", None) is module:
            decorator.fn = type(module).calculate_loss.__get__(module)  # type: ignore[union-attr]
    return loss


def similarity_name(function: Callable[..., Any]) -> str | None:
    """``similarity`` of :func:`repdeg_fast.contrastive_loss` for a function of sentence-transformers; ``None`` for one
    of a user's, with which the loss is computed as there."""
    if function is cos_sim:
        return "cosine"
    if function is dot_score:
        return "dot"
    name = getattr(function, "__name__", repr(function))
    forbid_if_strict(f"repdeg_fast: similarity_fct={name} is neither cos_sim nor dot_score: the loss is not fused")
    return None
