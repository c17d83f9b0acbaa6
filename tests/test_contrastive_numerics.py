"""The contrastive loss is as exact as eager PyTorch in the same dtype, wherever the vectors lie."""

import pytest
import torch
import torch.nn.functional as F
from contrastive_cases import expected
from helpers import relative_error

from repdeg_fast import contrastive_loss, span_pair_loss
from repdeg_fast.ops.contrastive import operation  # noqa: F401 (the fixture `place` asks for it)
from repdeg_fast.training import cached_backward


def _eager(queries, documents, scale):
    scores = scale * F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
    return F.cross_entropy(scores.float(), torch.arange(len(queries), device=queries.device))


@pytest.mark.parametrize("kind", ["plain", "offset", "short", "long"])
def test_error_is_at_most_twice_that_of_eager(kind, place):
    """Of values and gradients, by norm; also with a large common part, and for vectors of 1e-4 or 1e4."""
    n, d, scale = 48, 24, 20.0
    size = {"short": 1e-4, "long": 1e4}.get(kind, 1.0)
    for dtype in place.dtypes():
        if dtype == torch.float64 or (dtype == torch.float16 and kind != "plain"):
            continue  # exact; out of its range
        queries = torch.randn(n, d) * size + (1000 if kind == "offset" else 0)
        documents = queries + 2 * size * torch.randn(n, d)
        vectors = [x.to(place.device, dtype).requires_grad_() for x in (queries, documents)]
        true_loss, true = expected(vectors, scale=scale)
        errors = []
        for call in (contrastive_loss, _eager):
            loss = call(*vectors, scale=scale)
            gradients = torch.autograd.grad(loss, vectors)
            errors.append([relative_error(loss, true_loss), *map(relative_error, gradients, true)])
        ours, eager = errors
        least = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
        assert all(a <= max(2 * b, least) for a, b in zip(ours, eager, strict=True)), (dtype, errors)


def test_large_dot_products(place):
    """Logits of 1e4: a softmax is relative to its largest one."""
    dtype = place.dtypes()[0]
    x = (100 * torch.randn(12, 4, dtype=torch.float64)).to(place.device, dtype).requires_grad_()
    loss = contrastive_loss(x, x, similarity="dot", scale=1.0, directions=("query_to_doc", "query_to_query"))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 5, 12])
def test_mini_batches_do_not_matter_in_float64(size):
    encoder = torch.nn.Linear(6, 5).double()
    batch = torch.randn(12, 6, dtype=torch.float64)
    span_pair_loss(encoder(batch)).backward()
    true, encoder.weight.grad = encoder.weight.grad, None
    cached_backward(encoder, span_pair_loss, batch, chunk_size=size)
    assert relative_error(encoder.weight.grad, true) < 1e-14
