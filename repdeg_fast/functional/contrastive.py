"""The contrastive losses: arguments checked, then handed to :mod:`repdeg_fast.ops.contrastive`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repdeg_fast import backends
from repdeg_fast._arithmetic import autocast_dtype
from repdeg_fast._checks import check_choice, check_dense, check_finite, check_floating, check_positive
from repdeg_fast.contracts.contrastive import DIRECTIONS, HARDNESS_MODES
from repdeg_fast.ops import contrastive as _ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SIMILARITIES = ("cosine", "dot")
PARTITION_MODES = ("joint", "per_direction")
REDUCTIONS = ("none", "sum", "mean")
EXCHANGES = ("gather", "ring")
SAME_TYPE = ("query_to_query", "doc_to_doc")


def contrastive_loss(
    queries: Tensor,  # (N, d)
    documents: Tensor,  # (C·(1 + H), d)
    *,
    scale: float = 20.0,
    similarity: str = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    query_ids: Tensor | None = None,  # (C,)
    document_ids: Tensor | None = None,  # (C·(1 + H),)
    false_negative_margin: float | None = None,
    positive: Tensor | None = None,  # (N,)
    all_queries: Tensor | None = None,  # (C, d)
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    """The contrastive loss of a batch (InfoNCE, multiple negatives ranking) and its gradients without the N × C matrix.

    Semantics are those of ``MultipleNegativesRankingLoss`` of sentence-transformers 6.2; the equations are in
    :mod:`repdeg_fast.reference.contrastive`. Memory beyond inputs and gradients is O(N + C) values and one buffer of
    scores of at most 64 MiB on the CPU, where it is kept for the next call, and 512 MiB on a GPU (or 16 rows); 16-bit
    gradients are summed in float32, which takes a wide copy of them and one more for products. Vectors are not
    normalized in memory, and the gradients are made in the forward pass where ``reduction`` is not ``"none"`` and the
    dtype is not float16.

    Args:
        queries: (N, d), float32, float64, bfloat16 or float16, any strides. Under autocast it is converted to the
            autocast dtype, as are the others. In float16 on a GPU products of unnormalized vectors must fit the dtype:
            norms up to 250.
        documents: (C·(1 + H), d): first the positive of each of the C queries, then H blocks of hard negatives, each
            with one for every query. C is N, but for ``all_queries``.
        scale: multiplies similarities; 1/temperature.
        similarity: ``"cosine"``, or ``"dot"`` (then usually ``scale=1``).
        directions: what a row meets: ``"query_to_doc"``, always, ``"query_to_query"``, ``"doc_to_query"`` and
            ``"doc_to_doc"`` (arXiv 2308.03281).
        partition_mode: ``"joint"``, one softmax over all directions, or ``"per_direction"``, the mean of one loss each;
            not with directions between vectors of one type, which contain no positive.
        hardness_mode: which negatives' logits get hardness_strength·similarity more, without a gradient:
            ``"in_batch_negatives"`` (arXiv 2503.04812), ``"hard_negatives"`` (arXiv 2509.20354) or ``"all_negatives"``.
        query_ids: (C,) integers. Queries of the same id are not each other's negatives, nor are their positives.
        document_ids: integers. A document with the id of a row's positive is none of its negatives, nor is a query
            with such a positive. Ids come from the data: dropout gives equal texts different vectors.
        false_negative_margin: whoever is more similar than the positive by more than this is no negative.
        positive: (N,) integers, the column of each row's positive among the documents; by default 0, 1, ..., N − 1.
            For rows that are one rank's share of the queries. Whatever needs to know which documents belong to which
            query (other directions, ``hardness_mode``, ``query_ids``) then needs ``all_queries``, too.
        all_queries: (C, d), the queries of all ranks; row r of ``queries`` is number ``positive[r]`` of them. Their
            gradient is what they get as columns.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        group: a process group whose ranks have a part of the batch each, of any size (all ranks:
            ``torch.distributed.group.WORLD``); ids are their own. The loss is that of the whole batch, the same on all
            ranks (for ``"none"`` the own rows'); gradients are its gradients times the number of ranks, which averaging
            over ranks undoes.
        exchange: with ``group``, ``"gather"`` the documents (and queries, where they are columns), or pass documents
            round the ``"ring"``, so that no rank holds all of them: for ``query_to_doc`` without masks or hardness.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or (N,) for ``reduction="none"``. A zero vector has
        similarity 0 with all and a zero gradient (``F.normalize`` would send it one of about 1e12). A row that has no
        negative left has loss 0 and a zero gradient, and counts in the mean.

    Raises:
        TypeError, ValueError: naming the argument. A ``positive`` out of range raises on the CPU; on a GPU, where a
            check would stall the stream, it is undefined.
    """
    check_options(scale, similarity, directions, partition_mode, hardness_mode, hardness_strength, reduction)
    check_choice("exchange", exchange, EXCHANGES)
    if group is not None:
        from repdeg_fast.distributed import contrastive as over_ranks

        return over_ranks.contrastive_loss(
            queries, documents, group, exchange, scale=scale, similarity=similarity, directions=directions,
            partition_mode=partition_mode, hardness_mode=hardness_mode, hardness_strength=hardness_strength,
            query_ids=query_ids, document_ids=document_ids, false_negative_margin=false_negative_margin,
            positive=positive, all_queries=all_queries, reduction=reduction,
        )  # fmt: skip
    if false_negative_margin is not None:
        check_finite("false_negative_margin", false_negative_margin)
    _check_matrix("queries", queries, None)
    _check_matrix("documents", documents, queries)
    if all_queries is not None:
        _check_matrix("all_queries", all_queries, queries)
    groups = _groups(queries, documents, positive, all_queries)
    if positive is not None:
        _check_indices("positive", positive, queries.shape[0], queries)
        if not groups and (set(directions) != {"query_to_doc"} or hardness_mode or query_ids is not None):
            raise ValueError(
                "all_queries: expected a tensor (C, d) beside positive, since other directions, hardness_mode and "
                "query_ids ask which documents belong to which query, got None"
            )
        _check_range(positive, groups or documents.shape[0])
    for name, ids, length in (("query_ids", query_ids, groups), ("document_ids", document_ids, documents.shape[0])):
        if ids is not None:
            _check_indices(name, ids, length, queries)
    queries, documents, all_queries = _operands(queries, documents, all_queries)
    chosen = [name in directions for name in DIRECTIONS]
    return _call(
        (queries, documents, all_queries), (positive, None, query_ids, document_ids), groups, scale,
        similarity == "cosine", chosen, partition_mode == "joint", hardness_mode if hardness_strength else None,
        hardness_strength, false_negative_margin, reduction,
    )  # fmt: skip


def span_pair_loss(
    x: Tensor,  # (2n, d)
    *,
    reduction: str = "mean",
) -> Tensor:
    """coCondenser's contrastive loss (arXiv 2108.05540, equation 4) without the square of scores.

    Rows 2i and 2i + 1 are spans of one document; each shall find the other among all rows but itself by dot product,
    neither normalized nor scaled: the cross entropy of x xᵀ with −∞ on its diagonal and the targets i xor 1. The
    published training multiplies the mean by the number of ranks, whose gradients are then averaged.

    Args:
        x: (2n, d), float32, float64, bfloat16 or float16, any strides; its gradient has both parts, of rows and
            columns.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or (2n,). For one pair alone it is 0.

    Raises:
        TypeError, ValueError: naming the argument; an odd number of rows.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _check_matrix("x", x, None)
    if x.shape[0] % 2:
        raise ValueError(f"x: expected pairs of rows, an even number, got {x.shape[0]}")
    own = torch.arange(x.shape[0], device=x.device)
    (x,) = _operands(x)
    chosen = [name == "query_to_doc" for name in DIRECTIONS]
    return _call((x, None, None), (own ^ 1, own, None, None), 0, 1.0, False, chosen, True, None, 0.0, None, reduction)


def _call(
    vectors: tuple[Tensor, Tensor | None, Tensor | None], indices: tuple[Tensor | None, ...], groups: int,
    scale: float, cosine: bool, directions: list[bool], joint: bool, hardness_mode: str | None,
    hardness_strength: float, margin: float | None, reduction: str,
) -> Tensor:  # fmt: skip
    grad = torch.is_grad_enabled() and reduction != "none" and vectors[0].dtype != torch.float16
    made = [grad and x is not None and x.requires_grad for x in vectors]
    integers = [None if i is None else i.long().contiguous() for i in indices]
    arguments: Any = (
        *vectors, *integers, groups, float(scale), cosine, directions, joint, hardness_mode or "",
        float(hardness_strength), None if margin is None else float(margin), reduction, made, backends.requested(),
    )  # fmt: skip
    loss, *_ = _ops.contrastive(*arguments)
    return loss


def check_options(
    scale: float, similarity: str, directions: Sequence[str], partition_mode: str, hardness_mode: str | None,
    hardness_strength: float, reduction: str,
) -> None:  # fmt: skip
    check_positive("scale", scale)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("partition_mode", partition_mode, PARTITION_MODES)
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(directions, str) or not isinstance(directions, Sequence) or not directions:
        raise ValueError(f"directions: expected a tuple of {', '.join(DIRECTIONS)}, got {directions!r}")
    for name in directions:
        check_choice("directions", name, DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions: expected query_to_doc among them, which has the positive, got {directions!r}")
    if partition_mode == "per_direction" and (same := [name for name in directions if name in SAME_TYPE]):
        raise ValueError(
            f"partition_mode: expected joint with {' and '.join(same)}, which contain no positive of their own, "
            "got per_direction"
        )
    if hardness_mode is not None:
        check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
    check_finite("hardness_strength", hardness_strength)
    if hardness_strength < 0:
        raise ValueError(f"hardness_strength: expected 0 or more, got {hardness_strength}")


def _check_matrix(name: str, matrix: Tensor, queries: Tensor | None) -> None:
    check_floating(name, matrix)
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name}: expected 2 dimensions (N, d), d at least 1, got shape {tuple(matrix.shape)}")
    if queries is None:
        if matrix.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one row, got shape {tuple(matrix.shape)}")
        return
    if matrix.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{name}: expected width {queries.shape[1]} like queries {tuple(queries.shape)}, "
            f"got shape {tuple(matrix.shape)}"
        )
    if matrix.device != queries.device:
        raise ValueError(f"{name}: expected device {queries.device} like queries, got {matrix.device}")


def _groups(queries: Tensor, documents: Tensor, positive: Tensor | None, all_queries: Tensor | None) -> int:
    """C, or 0 where it is not known."""
    n, columns = queries.shape[0], documents.shape[0]
    if positive is None:
        if all_queries is not None:
            raise ValueError("positive: expected the number of each row among all_queries, got None")
        if n < 2:
            raise ValueError(
                f"queries: expected at least 2, each other's negatives, got {n}; positive=torch.arange({n}) says that "
                "one alone is meant"
            )
    elif all_queries is None:
        if columns == 0:
            raise ValueError(f"documents: expected at least one, got shape {tuple(documents.shape)}")
        return 0
    groups, of = (n, "queries") if all_queries is None else (all_queries.shape[0], "all_queries")
    if groups == 0 or columns == 0 or columns % groups:
        raise ValueError(
            f"documents: expected a multiple of the {groups} {of}, positives and then blocks of hard negatives, "
            f"got {columns}"
        )
    return groups


def _check_indices(name: str, indices: Tensor, length: int, queries: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name}: expected a tensor of int64 or int32, got {given}")
    check_dense(name, indices)
    if indices.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(indices.shape)}")
    if indices.device != queries.device:
        raise ValueError(f"{name}: expected device {queries.device} like queries, got {indices.device}")


def _check_range(positive: Tensor, columns: int) -> None:
    if positive.device.type != "cpu" or torch.compiler.is_compiling():
        return
    smallest, largest = (bound.item() for bound in positive.aminmax())
    if smallest < 0 or largest >= columns:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"positive: expected values from 0 to {columns - 1}, got {wrong}")


def _operands(queries: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """In the dtype that is multiplied: autocast's where it is on."""
    autocast = autocast_dtype(queries.device)
    if autocast is not None and queries.dtype != torch.float64:
        return queries.to(autocast), *(x if x is None else x.to(autocast) for x in others)
    for name, x in zip(("documents", "all_queries"), others, strict=False):
        if x is not None and x.dtype != queries.dtype:
            raise TypeError(
                f"{name}: expected {queries.dtype} like queries, got {x.dtype}; convert one of them or use "
                f"torch.autocast"
            )
    return queries, *others
