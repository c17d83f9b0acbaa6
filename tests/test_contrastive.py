"""The contrastive loss: every backend against the definition in float64."""

import pytest
import torch
from contrastive_cases import OPTIONS, assert_close, cut_small, definition, expected, inputs, with_ids
from helpers import TOLERANCE, relative_error

import repdeg_fast
from repdeg_fast import contrastive_loss, span_pair_loss
from repdeg_fast.ops.contrastive import contrastive, contrastive_rescale_, operation

INTERPRETED = ("default", "symmetric", "ids everywhere", "margin, in-batch", "hard")  # what the kernel can be asked


@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradients(name, place, monkeypatch):
    if place.backend == "triton" and place.device == "cpu" and name not in INTERPRETED:
        pytest.skip("the interpreter is slow")
    cut_small(monkeypatch)
    dtype = torch.float64 if torch.float64 in place.dtypes() else torch.float32
    queries, documents = inputs(n=21, dtype=dtype, device=place.device)
    options = with_ids(OPTIONS[name], 21, 42, place.device)
    loss = contrastive_loss(queries, documents, **options)
    loss.backward()
    assert_close(loss, [queries, documents], *expected((queries, documents), **options), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(2, 0, 1), (3, 2, 7), (33, 0, 16), (33, 1, 20)], ids=str)
def test_shapes_and_dtypes(shape, place):
    n, hard, width = shape
    for dtype in place.dtypes():
        queries, documents = inputs(n, hard, width, dtype, place.device)
        options = {"directions": ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"), "scale": 5.0}
        loss = contrastive_loss(queries, documents, **options)
        loss.backward()
        assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
        true = expected((queries, documents), **options)
        if width > 1:
            assert_close(loss, [queries, documents], *true, 2 * TOLERANCE[dtype])
        else:  # every gradient is radial
            assert relative_error(loss, true[0]) <= TOLERANCE[dtype]
            assert max(queries.grad.norm(), documents.grad.norm()) <= 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction, place):
    dtype = place.dtypes()[0]
    queries, documents = inputs(n=9, dtype=dtype, device=place.device)
    upstream = torch.rand(9, dtype=dtype, device=place.device) if reduction == "none" else 2 * torch.ones(9)
    loss = contrastive_loss(queries, documents, reduction=reduction)
    loss.backward(upstream if reduction == "none" else torch.tensor(2.0, device=place.device))
    rows, gradients = expected((queries, documents), upstream)
    assert_close(loss, [queries, documents], rows.sum() if reduction == "sum" else rows, gradients, TOLERANCE[dtype])


def test_strides(place):
    dtype = place.dtypes()[0]
    wide, tall = (torch.randn(size, dtype=dtype, device=place.device) for size in ((20, 26), (13, 40)))
    queries, documents = wide[:, ::2].detach().requires_grad_(), tall.t().detach().requires_grad_()
    loss = contrastive_loss(queries, documents, directions=("query_to_doc", "doc_to_query"))
    loss.backward()
    true = expected((queries, documents), directions=("query_to_doc", "doc_to_query"))
    assert_close(loss, [queries, documents], *true, TOLERANCE[dtype])


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "query_to_query", "doc_to_doc")])
def test_rows_of_one_rank(directions, place):
    """The share of a rank and all of the others: mean losses of the shares are that of the whole, and so are the sums
    of their gradients."""
    dtype = place.dtypes()[0]
    vectors = inputs(n=12, dtype=dtype, device=place.device)
    queries, documents = vectors
    options = {"directions": directions, "hardness_mode": "in_batch_negatives", "hardness_strength": 2.0}
    losses = []
    for share in (torch.arange(5), torch.arange(5, 12)):
        share = share.to(place.device)
        loss = contrastive_loss(
            queries[share], documents, positive=share, all_queries=queries, reduction="sum", **options
        )
        losses.append(loss / 12)
    sum(losses).backward()
    assert_close(sum(losses), vectors, *expected(vectors, **options), TOLERANCE[dtype])


def test_named_positives(place):
    """In any order, and two rows with the same."""
    dtype = place.dtypes()[0]
    queries, documents = inputs(n=6, dtype=dtype, device=place.device)
    positive = torch.tensor([3, 0, 11, 3, 7, 5], dtype=torch.int32, device=place.device)
    loss = contrastive_loss(queries, documents, positive=positive)
    loss.backward()
    true = expected((queries, documents), positive=positive.long())
    assert_close(loss, [queries, documents], *true, TOLERANCE[dtype])


def test_span_pairs(place, monkeypatch):
    """coCondenser's computation as it is published, written out."""
    cut_small(monkeypatch)
    dtype = place.dtypes()[0]
    x = (torch.randn(40, 9, dtype=torch.float64)).to(place.device, dtype).requires_grad_()
    loss = span_pair_loss(x)
    loss.backward()
    true = x.detach().double().cpu().requires_grad_()
    scores = true @ true.T
    scores.fill_diagonal_(-torch.inf)
    target = torch.tensor([i + 1 if i % 2 == 0 else i - 1 for i in range(40)])
    torch.nn.functional.cross_entropy(scores, target).backward()
    assert_close(loss, [x], torch.nn.functional.cross_entropy(scores, target), [true.grad], TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")}], ids=str)
def test_zero_vectors(options, place):
    """Similarity 0 with all, a zero gradient; the others are as if it were any vector at right angles."""
    dtype = place.dtypes()[0]
    queries, documents = inputs(n=7, dtype=dtype, device=place.device)
    with torch.no_grad():
        queries[2] = documents[4] = 0
    loss = contrastive_loss(queries, documents, **options)
    loss.backward()
    true_loss, (true_queries, true_documents) = expected((queries, documents), **options)
    assert queries.grad[2].abs().max() == documents.grad[4].abs().max() == 0
    true_queries[2] = true_documents[4] = 0
    assert_close(loss, [queries, documents], true_loss, [true_queries, true_documents], TOLERANCE[dtype])


def test_rows_without_negatives(place):
    """Loss 0 and no gradient, while the row counts."""
    dtype = place.dtypes()[0]
    queries, documents = inputs(n=5, hard=0, dtype=dtype, device=place.device)
    same = torch.tensor([0, 0, 0, 0, 0], device=place.device)
    loss = contrastive_loss(queries, documents, query_ids=same, reduction="none")
    loss.sum().backward()
    assert loss.abs().max() <= (1e-6 if place.backend == "triton" else 0)  # a compiler may fuse the difference
    assert queries.grad.abs().max() <= TOLERANCE[dtype]
    one_of_two = contrastive_loss(queries, documents, document_ids=torch.tensor([0, 0, 0, 0, 1], device=place.device))
    assert one_of_two < contrastive_loss(queries, documents)
    assert span_pair_loss(queries[:2]) == 0


def test_masked_documents_get_nothing(place):
    dtype = place.dtypes()[0]
    queries, documents = inputs(n=4, dtype=dtype, device=place.device)
    ids = torch.tensor([0, 1, 2, 3, 0, 0, 2, 1], device=place.device)
    rows = contrastive_loss(queries, documents, document_ids=ids, reduction="none")
    rows[0].backward()
    assert documents.grad[[4, 5]].abs().max() == 0
    assert documents.grad[[0, 1, 6]].abs().min(1).values.min() > 0


def test_not_a_number_comes_out(place):
    dtype = place.dtypes()[0]
    for bad in (torch.nan, torch.inf):
        queries, documents = inputs(n=4, dtype=dtype, device=place.device)
        with torch.no_grad():
            documents[1, 2] = bad
        loss = contrastive_loss(queries, documents)
        loss.backward()
        assert loss.isnan()
        assert queries.grad.isnan().any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunks_do_not_matter(backend, monkeypatch):
    """In float64, to rounding; and the same call gives the same bits."""
    queries, documents = inputs(n=50, hard=1)
    found = []
    for small in (False, False, True):
        if small:
            cut_small(monkeypatch)
        queries.grad = documents.grad = None
        with repdeg_fast.use_backend(backend):
            loss = contrastive_loss(queries, documents, **OPTIONS["margin everywhere"])
        loss.backward()
        found.append((loss.detach(), queries.grad, documents.grad))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(found[0], found[2], strict=True))


def test_gradcheck(place):
    if torch.float64 not in place.dtypes():
        pytest.skip("no float64")
    queries, documents = inputs(n=4, width=3)
    options = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "scale": 3.0}
    torch.autograd.gradcheck(lambda q, d: contrastive_loss(q, d, **options), (queries, documents))
    torch.autograd.gradcheck(lambda q: span_pair_loss(q), (queries,))


def test_opcheck(place):
    dtype = torch.float64 if torch.float64 in place.dtypes() else torch.float32
    queries, documents = inputs(n=5, dtype=dtype, device=place.device)
    options = (5, 20.0, True, [True, False, True, False], True, "", 0.0, None)
    arguments = (queries, documents, *[None] * 5, *options)
    torch.library.opcheck(contrastive.overload, (*arguments, "none", [False] * 3, place.backend))
    # gradients that are made in the forward pass are scaled in place: traced code must not return them, too
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        contrastive.overload, (*arguments, "mean", [True, True, False], place.backend), test_utils=checks
    )
    made = [torch.rand_like(x) for x in (queries, documents, queries)]
    torch.library.opcheck(contrastive_rescale_.overload, (*made, torch.tensor(0.5, device=place.device)))


def test_graph_run_twice(place):
    dtype = place.dtypes()[0]
    queries, documents = inputs(n=6, dtype=dtype, device=place.device)
    loss = 3 * contrastive_loss(queries, documents)
    first, second = (torch.autograd.grad(loss, [queries, documents], retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert relative_error(a, b) <= TOLERANCE[dtype]


def test_half_precision_gradients_do_not_underflow(place):
    """In fp16 they are made when the loss scale is known."""
    if torch.float16 not in place.dtypes():
        pytest.skip("no fp16")
    queries, documents = inputs(n=64, hard=0, dtype=torch.float16, device=place.device)
    loss = contrastive_loss(queries, documents, scale=1e-4)
    loss.backward(torch.tensor(2.0**16, device=place.device))
    _, gradients = expected((queries, documents), torch.full((64,), 2.0**16 / 64), scale=1e-4)
    assert relative_error(queries.grad, gradients[0]) <= TOLERANCE[torch.float16]


def test_definition_is_the_paper_sum():
    """Two queries by hand, so that the definition is not only compared with itself."""
    q, d = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    cosine = torch.tensor([[1.0, 0.5**0.5], [0.0, 0.5**0.5]])
    e = (2 * cosine).exp()
    expected_rows = torch.stack([(e[0].sum() / e[0, 0]).log(), (e[1].sum() / e[1, 1]).log()])
    torch.testing.assert_close(definition(q, d, scale=2.0), expected_rows)
    torch.testing.assert_close(contrastive_loss(q, d, scale=2.0, reduction="none"), expected_rows)


def test_operation_is_listed():
    assert set(operation.limits) == {"reference", "cpu", "triton"}
