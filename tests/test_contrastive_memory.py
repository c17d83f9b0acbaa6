"""What the contrastive loss holds in memory, and against what the literature's implementation computes."""

import pytest
import torch
from contrastive_cases import GRID, definition, inputs
from helpers import relative_error, saved_bytes
from test_linear_cross_entropy_memory import peak_bytes

from repdeg_fast import contrastive_loss
from repdeg_fast.ops import buffers


def test_saves_the_gradients():
    queries, documents = inputs(n=40, hard=1, dtype=torch.float32)
    assert saved_bytes(lambda: contrastive_loss(queries, documents), queries, documents) == 3 * 40 * 12 * 4


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "query_to_query", "doc_to_query")])
def test_peak_memory(directions):
    """Beyond inputs and gradients at most 64 MiB, where the scores alone would be 256 MiB a direction."""
    buffers.release()
    queries, documents = (torch.randn(8192, 16, requires_grad=True) for _ in range(2))
    with torch.no_grad():  # kernels are looked up
        contrastive_loss(queries[:2], documents[:2])

    def step():
        contrastive_loss(queries, documents, directions=directions).backward()

    assert 2 * queries.nbytes < peak_bytes(step) <= 2 * queries.nbytes + (64 << 20)
    buffers.release()


@pytest.mark.parametrize("hard", [0, 2])
def test_equals_sentence_transformers(hard):
    """Values and gradients over the grid of options, cosine and dot, in float64."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from sentence_transformers.util import cos_sim, dot_score

    queries, documents = inputs(n=6, hard=hard, width=5)
    for options in GRID:
        for similarity, function in (("cosine", cos_sim), ("dot", dot_score)):
            theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), 3.0, function, **options)
            expected = theirs.compute_loss_from_embeddings([queries, *documents.split(6)], None)
            gradients = torch.autograd.grad(expected, (queries, documents))
            for call in (definition, contrastive_loss):
                ours = call(queries, documents, scale=3.0, similarity=similarity, **options).mean()
                assert relative_error(ours, expected) < 1e-12
                for a, b in zip(torch.autograd.grad(ours, (queries, documents)), gradients, strict=True):
                    assert relative_error(a, b) < 1e-11
