"""Batches of the contrastive loss, and what its definition makes of them in float64."""

import itertools

import torch
from helpers import relative_error

from repdeg_fast.contracts.contrastive import DIRECTIONS, Batch, LossRule
from repdeg_fast.ops import buffers
from repdeg_fast.reference import contrastive as reference

# every option alone, and those that meet in the kernel together: names of arguments of contrastive_loss
OPTIONS = {
    "default": {},
    "dot": {"similarity": "dot", "scale": 0.5},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "all directions": {"directions": DIRECTIONS},
    "all directions, dot": {"directions": DIRECTIONS, "similarity": "dot", "scale": 0.5},
    "in-batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0, "directions": DIRECTIONS},
    "all negatives": {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
    "ids": {"ids": True},
    "ids everywhere": {
        "ids": True,
        "directions": DIRECTIONS,
        "hardness_mode": "all_negatives",
        "hardness_strength": 2.0,
    },
    "margin": {"false_negative_margin": 0.1},
    "margin everywhere": {"false_negative_margin": 0.05, "directions": DIRECTIONS},
    "margin, in-batch": {
        "false_negative_margin": 0.1,
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 4.0,
        "directions": DIRECTIONS,
    },
}


def cut_small(monkeypatch):
    """Several chunks of rows also at test sizes."""
    monkeypatch.setattr(buffers, "LIMIT", {"cpu": 0, "cuda": 0})


def inputs(n=21, hard=1, width=12, dtype=torch.float64, device="cpu"):
    """Queries, and documents that resemble them; hard negatives behind."""
    queries = torch.randn(n, width, dtype=torch.float64)
    documents = torch.cat([queries + 2 * torch.randn(n, width, dtype=torch.float64) for _ in range(1 + hard)])
    return [x.to(device, dtype).requires_grad_() for x in (queries * 1.5, documents)]


def with_ids(options, n, columns, device="cpu"):
    """``ids=True`` in ``options`` as tensors, in which some queries and some documents are the same."""
    options = dict(options)
    if options.pop("ids", False):
        options["query_ids"] = (torch.arange(n) % (n - 3)).to(device)
        options["document_ids"] = (torch.arange(columns) % (columns - 5)).to(device)
    return options


def definition(
    queries, documents, *, scale=20.0, similarity="cosine", directions=("query_to_doc",), partition_mode="joint",
    hardness_mode=None, hardness_strength=0.0, query_ids=None, document_ids=None, false_negative_margin=None,
    positive=None, all_queries=None, excluded=None,
):  # fmt: skip
    """ℓ of every row, of the arguments of contrastive_loss."""
    groups = len(queries if all_queries is None else all_queries)
    positive = torch.arange(len(queries)) if positive is None else positive
    directions = tuple(name for name in DIRECTIONS if name in directions)
    rule = LossRule(
        scale, similarity == "cosine", directions, partition_mode == "joint", hardness_mode, hardness_strength,
        false_negative_margin,
    )  # fmt: skip
    batch = Batch(queries, documents, all_queries, positive, excluded, query_ids, document_ids, groups)
    return reference.contrastive_loss(batch, rule)


def expected(vectors, upstream=None, **options):
    """Loss (mean, or rows where there is an upstream gradient of each) and gradients, in float64 on the CPU."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in vectors]
    options = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    all_queries = leaves[2] if len(leaves) > 2 else None
    rows = definition(*leaves[:2], all_queries=all_queries, **options)
    loss = rows.mean() if upstream is None else rows
    loss.backward(None if upstream is None else upstream.double().cpu())
    return loss.detach(), [leaf.grad for leaf in leaves]


def assert_close(loss, leaves, true_loss, true_gradients, tolerance):
    assert relative_error(loss, true_loss) <= tolerance
    for leaf, true in zip(leaves, true_gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, true) <= tolerance


GRID = [
    {"directions": (DIRECTIONS[0], *more), "partition_mode": partition, "hardness_mode": mode, "hardness_strength": 3.0}
    for k in range(4)
    for more in itertools.combinations(DIRECTIONS[1:], k)
    for partition in ("joint", "per_direction")
    for mode in (None, "in_batch_negatives", "hard_negatives", "all_negatives")
    if partition == "joint" or not {"query_to_query", "doc_to_doc"} & set(more)
]
