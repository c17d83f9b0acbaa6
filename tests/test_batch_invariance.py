"""REPDEG_FAST_PRODUCTS=batch-invariant: no bit of a row depends on the rows beside it, on their number, or on its place
among them."""

import pytest
import torch

import repdeg_fast
from repdeg_fast.native import build, products

pytestmark = pytest.mark.cpp
V, D, N = 1100, 40, 70  # products by oneDNN and too small for it, in more than one piece
PARTS = [slice(0, 1), slice(0, 2), slice(0, 17), slice(3, 67), slice(69, 70)]


@pytest.fixture(autouse=True, params=[1, 3])
def _invariant(request, threads, monkeypatch):
    if reason := build.unavailable("cpu"):
        pytest.skip(reason)
    threads(request.param)
    monkeypatch.setenv(products.VARIABLE, products.BATCH_INVARIANT)
    products.forget()
    try:
        products.settle(torch.ops.repdeg_fast_native)
    except RuntimeError as error:  # another version of oneDNN
        pytest.skip(str(error))
    with repdeg_fast.use_backend("cpu"):
        yield
    products.forget()


def assert_same_bits(function, rows, dim=0):
    """``function(first row, *leaves)`` returns values a row; of the leaves those in ``rows`` are cut along ``dim``."""

    def of(part):
        leaves = [leaf.detach()[(slice(None),) * dim + (part,)].requires_grad_() for leaf in rows]
        outputs = function(part, *leaves)
        gradients = torch.autograd.grad([o.sum() for o in outputs if o.requires_grad], leaves, materialize_grads=True)
        return outputs, gradients

    outputs, gradients = of(slice(0, N))
    for part in PARTS:
        some, some_gradients = of(part)
        for whole, mine in zip(outputs, some, strict=True):
            assert torch.equal(whole[..., part] if whole.shape[-1] == N else whole[part], mine)
        for whole, mine in zip(gradients, some_gradients, strict=True):
            assert torch.equal(whole[(slice(None),) * dim + (part,)], mine)


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_cross_entropy(strategy, dtype):
    hidden, weight, bias = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)
    target = torch.randint(V, (N,))
    options = {"reduction": "none", "strategy": strategy, "label_smoothing": 0.1}

    def losses(part, hidden):
        return repdeg_fast.linear_cross_entropy(hidden, weight, target[part], bias, **options, return_lse=True)

    assert_same_bits(losses, [hidden])


def test_heads():
    hidden, weight, target = torch.randn(2, N, D), torch.randn(V, D), torch.randint(V, (N,))

    def losses(part, hidden):
        return (repdeg_fast.multi_layer_mlm_loss(hidden, weight, target[part], reduction="none"),)

    assert_same_bits(losses, [hidden], dim=1)


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_mix(hard):
    """A row keeps its noise: it has its number."""
    hidden, logits = torch.randn(2, N, D), torch.randn(N, 2)
    weight, embedding = torch.randn(V, D) / 6, torch.randn(V, 24)

    def values(part, logits):
        return (
            repdeg_fast.gumbel_mix(
                hidden[:, part], logits, weight, None, embedding, seed=5, hard=hard, first_position=part.start
            )[1],
        )

    assert_same_bits(values, [logits])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_contrastive_loss(similarity):
    queries, documents = torch.randn(N, D), torch.randn(V, D)
    options = {"similarity": similarity, "scale": 0.2, "reduction": "none"}

    def losses(part, queries):
        positive = torch.arange(N)[part]
        return (repdeg_fast.contrastive_loss(queries, documents, positive=positive, **options),)

    assert_same_bits(losses, [queries])


def test_what_it_cannot_do_is_an_error():
    hidden, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"batch-invariant products \(REPDEG_FAST_PRODUCTS\) are of float32"):
        repdeg_fast.linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64))
