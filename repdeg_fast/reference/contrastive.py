"""The contrastive loss of a batch: a cross entropy whose weight is the batch itself.

Row i is a query q_i with a positive document d_p, p = positive[i], and the similarity s(a, b) of two vectors is their
cosine, or their dot product. Its scores, by direction (sentence-transformers 6.2, `MultipleNegativesRankingLoss`):

    query_to_doc    s(q_i, d_j)   of all documents
    query_to_query  s(q_i, q_j)   of all other queries
    doc_to_query    s(d_p, q_j)   of all queries
    doc_to_doc      s(d_p, d_j)   of all documents of other queries

and its logits are z = scale·s, in query_to_doc + strength·s at the negatives that `hardness_mode` names, where this
second s is a constant (arXiv 2503.04812, equation 5). *Joint*: ℓ_i = lse of the row's logits in all directions − z_p.
Otherwise ℓ_i is the mean over directions of lse − z_p.

Not negatives, and left out of the sums: documents whose id is that of the positive, queries whose id or whose
positive's id is the row's, the positives of such queries, and all whose s exceeds s(q_i, d_p) by more than `margin`.

With p_j the softmax of a row, upstream gradient g and unit vectors x̂ = x/‖x‖,

    ∂/∂s_j = g·scale·(p_j − [j = p]),        ∂x̂_a = Σ ∂/∂s(a, b)·b̂,        dx = (∂x̂ − (∂x̂·x̂) x̂)/‖x‖

and a vector that is row in one direction and column in another gets both. A zero vector has similarity 0 with all and a
zero gradient. A row that has no negative left has ℓ = 0 and a zero gradient, and counts in a mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.contracts.contrastive import Batch, BlockRule, Ids, LossRule, ScoreBlock


def contrastive_loss(batch: Batch, rule: LossRule) -> Tensor:
    """The definition, ℓ of every row (R,), differentiable; O(R·W) memory: for tests and benchmarks."""
    queries, all_queries, documents = _vectors(batch, rule)
    similarities = []
    for direction in rule.directions:
        source, target = direction.split("_to_")
        rows = queries if source == "query" else documents[batch.positive]
        similarities.append(rows @ (all_queries if target == "query" else documents).T)
    at = batch.positive[:, None]
    positive = similarities[0].gather(1, at)
    logits = []
    for direction, s in zip(rule.directions, similarities, strict=True):
        z = rule.scale * s + _penalty(direction, s.detach(), batch, rule)
        logits.append(z.masked_fill(_masked(direction, s, positive, batch, rule), -math.inf))
    if rule.joint:
        return torch.cat(logits, dim=1).logsumexp(1) - logits[0].gather(1, at)[:, 0]
    return torch.stack([z.logsumexp(1) - z.gather(1, at)[:, 0] for z in logits]).mean(0)


def _vectors(batch: Batch, rule: LossRule) -> tuple[Tensor, Tensor, Tensor]:
    queries = batch.queries.to(arithmetic_dtype(batch.queries))
    all_queries = queries if batch.all_queries is None else batch.all_queries.to(queries.dtype)
    documents = queries if batch.documents is None else batch.documents.to(queries.dtype)
    if not rule.cosine:
        return queries, all_queries, documents
    unit = torch.nn.functional.normalize
    return unit(queries, dim=1), unit(all_queries, dim=1), unit(documents, dim=1)


def _own(columns: int, batch: Batch, period: int) -> Tensor:
    """(R, W): the columns positive[r] + h·period, or positive[r] alone."""
    distance = torch.arange(columns, device=batch.positive.device) - batch.positive[:, None]
    return distance % period == 0 if period else distance == 0


def _penalty(direction: str, s: Tensor, batch: Batch, rule: LossRule) -> Tensor | float:
    if direction != "query_to_doc" or rule.hardness_mode is None:
        return 0.0
    positive, own = _own(s.shape[1], batch, 0), _own(s.shape[1], batch, batch.groups)
    penalized = {"in_batch_negatives": ~own, "hard_negatives": own & ~positive, "all_negatives": ~positive}
    return rule.hardness_strength * s * penalized[rule.hardness_mode]


def _masked(direction: str, s: Tensor, positive: Tensor, batch: Batch, rule: LossRule) -> Tensor:
    """(R, W): what the row does not meet."""
    masked = torch.zeros_like(s, dtype=torch.bool)
    for ids in (batch.query_ids, batch.document_ids):
        if ids is not None:
            same = ids[batch.positive][:, None] == ids[: s.shape[1]]
            masked[:, : same.shape[1]] |= same
    if rule.margin is not None:
        masked |= s > positive + rule.margin
    masked &= ~_own(s.shape[1], batch, 0)
    if direction == "query_to_query":
        masked |= _own(s.shape[1], batch, 0)
    elif direction == "doc_to_doc":
        masked |= _own(s.shape[1], batch, batch.groups)
    elif direction == "query_to_doc" and batch.excluded is not None:
        masked.scatter_(1, batch.excluded[:, None], True)
    return masked


def rows(block: ScoreBlock, rule: BlockRule) -> None:
    """The row kernel: see the contract."""
    scores, origin, total, grad_loss = block.scores, block.origin, block.total, block.grad_loss
    z = _logits(block, rule)
    if not rule.softmax_known:
        most = z.amax(dim=1)
        origin.copy_(torch.where(most == -math.inf, 0, most))
        total.copy_((z - origin[:, None]).exp_().sum(dim=1))
    if grad_loss is None:
        return
    gradient = (z - origin[:, None]).exp_() / total[:, None]
    if rule.has_target:
        gradient.scatter_add_(1, block.positive[:, None], torch.full_like(gradient[:, :1], -1))
    gradient *= (grad_loss * rule.slope)[:, None]
    scores.copy_(_scaled(gradient, block))


def _scaled(values: Tensor, block: ScoreBlock, factor: float = 1.0) -> Tensor:
    """As the Triton and C++ kernels multiply, so that where they are compared they are the same bits."""
    if block.row_scale is None or block.column_scale is None:
        return values * factor
    return values * (block.row_scale * factor)[:, None] * block.column_scale


def _logits(block: ScoreBlock, rule: BlockRule) -> Tensor:
    z = _scaled(block.scores.to(block.origin.dtype), block, rule.multiplier)
    at = block.positive[:, None]
    positive = z.gather(1, at) * rule.positive_factor
    if block.threshold is not None:
        z.masked_fill_(z > block.threshold[:, None], -math.inf)
    for ids in filter(None, (block.query_ids, block.document_ids)):
        z[:, : len(ids.columns)].masked_fill_(_same(ids), -math.inf)
    own = None
    if block.own is not None:
        distance = torch.arange(z.shape[1], device=z.device) - block.own[:, None]
        own = (distance >= 0) & (distance % rule.period == 0) if rule.period else distance == 0
    if own is not None and rule.own_factor:
        z = torch.where(own, z * rule.own_factor, z)
    z.scatter_(1, at, positive)
    return z.masked_fill_(own, -math.inf) if own is not None and not rule.own_factor else z


def _same(ids: Ids) -> Tensor:
    return ids.rows[:, None] == ids.columns
