"""What the contrastive losses refuse, by name of the argument."""

import pytest
import torch

from repdeg_fast import ContrastiveLoss, contrastive_loss, span_pair_loss

Q, D = torch.randn(4, 6), torch.randn(8, 6)
INDEX = torch.arange(4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": Q[:1], "documents": D[:1]}, r"queries: expected at least 2, .* got 1; positive=torch.arange"),
        ({"queries": Q[0]}, r"queries: expected 2 dimensions \(N, d\), .* got shape \(6,\)"),
        ({"queries": Q[:0]}, r"queries: expected at least one row, got shape \(0, 6\)"),
        ({"documents": D[:, :5]}, r"documents: expected width 6 like queries \(4, 6\), got shape \(8, 5\)"),
        ({"documents": D[:7]}, r"documents: expected a multiple of the 4 queries, .* got 7"),
        ({"documents": D[:0]}, r"documents: expected a multiple of the 4 queries, .* got 0"),
        ({"documents": D[:0], "positive": INDEX}, r"documents: expected at least one"),
        ({"scale": 0}, r"scale: expected a finite number above 0, got 0"),
        ({"scale": float("inf")}, r"scale: expected a finite number above 0, got inf"),
        ({"similarity": "euclidean"}, r"similarity: expected one of 'cosine', 'dot', got 'euclidean'"),
        ({"directions": ()}, r"directions: expected a tuple of query_to_doc, .* got \(\)"),
        ({"directions": "query_to_doc"}, r"directions: expected a tuple of query_to_doc, query_to_query"),
        ({"directions": ("query_to_doc", "up")}, r"directions: expected one of 'query_to_doc', .* got 'up'"),
        ({"directions": ("doc_to_query",)}, r"directions: expected query_to_doc among them"),
        ({"exchange": "rings"}, r"exchange: expected one of 'gather', 'ring', got 'rings'"),
        ({"partition_mode": "both"}, r"partition_mode: expected one of 'joint', 'per_direction', got 'both'"),
        (
            {"partition_mode": "per_direction", "directions": ("query_to_doc", "doc_to_doc")},
            r"partition_mode: expected joint with doc_to_doc",
        ),
        ({"hardness_mode": "soft"}, r"hardness_mode: expected one of 'in_batch_negatives', .* got 'soft'"),
        ({"hardness_strength": -1.0}, r"hardness_strength: expected 0 or more, got -1.0"),
        ({"false_negative_margin": float("nan")}, r"false_negative_margin: expected a finite number"),
        ({"reduction": "max"}, r"reduction: expected one of 'none', 'sum', 'mean', got 'max'"),
        ({"query_ids": INDEX[:3]}, r"query_ids: expected shape \(4,\), got \(3,\)"),
        ({"document_ids": INDEX}, r"document_ids: expected shape \(8,\), got \(4,\)"),
        ({"positive": INDEX[:2]}, r"positive: expected shape \(4,\), got \(2,\)"),
        ({"positive": INDEX + 5}, r"positive: expected values from 0 to 7, got 8"),
        ({"positive": INDEX - 1}, r"positive: expected values from 0 to 7, got -1"),
        ({"positive": INDEX + 1, "all_queries": Q}, r"positive: expected values from 0 to 3, got 4"),
        ({"all_queries": Q}, r"positive: expected the number of each row among all_queries, got None"),
        ({"positive": INDEX, "all_queries": Q[:3]}, r"documents: expected a multiple of the 3 all_queries"),
        (
            {"positive": INDEX, "directions": ("query_to_doc", "doc_to_query")},
            r"all_queries: expected a tensor \(C, d\) beside positive",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_values(changed, message):
    arguments = {"queries": Q, "documents": D, **changed}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(arguments.pop("queries"), arguments.pop("documents"), **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": Q.int()}, r"queries: expected float32, float64, bfloat16 or float16, got torch.int32"),
        ({"documents": [1.0]}, r"documents: expected a tensor, got list"),
        ({"documents": D.double()}, r"documents: expected torch.float32 like queries, got torch.float64"),
        ({"query_ids": INDEX.float()}, r"query_ids: expected a tensor of int64 or int32, got torch.float32"),
        ({"positive": [0, 1, 2, 3]}, r"positive: expected a tensor of int64 or int32, got list"),
        ({"scale": "20"}, r"scale: expected a number, got str"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_types(changed, message):
    arguments = {"queries": Q, "documents": D, **changed}
    with pytest.raises(TypeError, match=message):
        contrastive_loss(arguments.pop("queries"), arguments.pop("documents"), **arguments)


def test_spans():
    with pytest.raises(ValueError, match="x: expected pairs of rows, an even number, got 3"):
        span_pair_loss(Q[:3])
    with pytest.raises(ValueError, match="reduction: expected one of"):
        span_pair_loss(Q, reduction="max")


def test_a_single_row_when_it_is_meant():
    """A rank's share may be one query, and a last batch one with hard negatives."""
    assert contrastive_loss(Q[:1], D[:1], positive=INDEX[:1]) == 0
    assert contrastive_loss(Q[:1], D[:3], positive=INDEX[:1]) > 0


def test_module():
    options = {"scale": 7.0, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    module = ContrastiveLoss(**options)
    ids = torch.tensor([0, 1, 0, 2])
    assert module(Q, D, query_ids=ids) == contrastive_loss(Q, D, query_ids=ids, **options)
    assert "scale=7.0" in repr(module)
    with pytest.raises(ValueError, match="scale: expected"):
        ContrastiveLoss(scale=-1.0)


def test_autocast():
    """Multiplied in the autocast dtype, as matmul is; gradients in that of the leaves."""
    queries, documents = Q.clone().requires_grad_(), D.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(queries, documents)
    loss.backward()
    assert loss.dtype == queries.grad.dtype == torch.float32
    assert loss == contrastive_loss(Q.bfloat16(), D.bfloat16())
