"""The measures over pairs as operators, their arguments, and what they hold in memory."""

import pytest
import torch
from helpers import relative_error, saved_bytes

import repdeg_fast
from repdeg_fast import CosineRegularization, global_orthogonal_regularization, pairwise_cosine, pairwise_max_cosine
from repdeg_fast.contracts.pairwise import Kind
from repdeg_fast.functional.pairwise import KINDS
from repdeg_fast.ops import buffers, chunked_logits, pairwise_blocks
from repdeg_fast.ops import pairwise as ops


def two_sets(dtype=torch.float64):
    return [torch.randn(size, 4, dtype=dtype).requires_grad_() for size in (6, 5)]


def test_opcheck():
    x, y = two_sets()
    for other in (None, y):
        needs = [True, other is not None]
        torch.library.opcheck(ops.pairwise_cosine.overload, (x, other, int(Kind.EXP), 2.0, False, 1e-12, needs, "auto"))
        for order in (1, 2):
            torch.library.opcheck(ops.pairwise_moment.overload, (x, other, order, True, 1e-12, "auto"))
        torch.library.opcheck(ops.pairwise_max_cosine.overload, (x, other, False, 1e-12, "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    x = torch.randn(20, 8, requires_grad=True)

    def step(x, margin):
        terms = [pairwise_cosine(x.tanh(), kind=kind, margin=margin) for kind in KINDS]
        return sum(terms) + pairwise_max_cosine(x).values.sum() + global_orthogonal_regularization(x)

    step(x, 0.1).backward()
    plain, x.grad = x.grad, None
    torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x, 0.1).backward()
    assert relative_error(x.grad, plain) <= 1e-6


def test_checkpointing_and_autocast():
    x = torch.randn(30, 40, requires_grad=True)
    for kind in KINDS:
        (plain,) = torch.autograd.grad(pairwise_cosine(x, kind=kind), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = torch.utils.checkpoint.checkpoint(lambda x: pairwise_cosine(x, kind=kind), x, use_reentrant=False)  # noqa: B023
        assert value.dtype == torch.float32
        assert relative_error(torch.autograd.grad(value, x)[0], plain) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_a_clear_error(kind):
    x, y = two_sets()
    (gradient,) = torch.autograd.grad(pairwise_cosine(x, y, kind=kind), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pairwise_cosine has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_one_of_two_sets(kind, wanted):
    sets = two_sets()
    both = torch.autograd.grad(pairwise_cosine(*sets, kind=kind), sets)
    leaves = [one.detach().requires_grad_(need) for one, need in zip(sets, wanted, strict=True)]
    value = pairwise_cosine(*leaves, kind=kind)
    assert value.requires_grad == any(wanted)
    if any(wanted):
        value.backward()
    for leaf, need, expected in zip(leaves, wanted, both, strict=True):
        assert torch.equal(leaf.grad, expected) if need else leaf.grad is None


def test_saves_moments_or_gradients():
    n, d = 300, 16
    x = torch.randn(n, d, requires_grad=True)
    for kind, most in (("square", d * d + n), ("abs", n * d), ("logmeanexp", n * d)):
        assert 0 < saved_bytes(lambda: pairwise_cosine(x, kind=kind), x) <= 4 * most  # noqa: B023
    assert saved_bytes(lambda: pairwise_max_cosine(x), x) <= 12 * n
    with torch.no_grad():
        assert not pairwise_cosine(x, kind="abs").requires_grad


def test_cosines_are_held_a_chunk_at_a_time(monkeypatch):
    """The matrix would be 9 MB; besides matrices of vectors there is a sixteenth of it, or what the limit says."""
    from test_linear_cross_entropy_memory import peak_bytes

    n, d = 1500, 8
    x = torch.randn(n, d, requires_grad=True)
    monkeypatch.setattr(pairwise_blocks, "ROWS", 16)
    buffers.release()
    for limit in (64 << 20, chunked_logits.THREAD_SUMS + (1 << 18)):
        monkeypatch.setattr(buffers, "LIMIT", {"cpu": limit, "cuda": limit})
        buffer = min(limit - chunked_logits.THREAD_SUMS, 4 * (n // 16 + 16) * 1504)
        for call in (lambda: pairwise_cosine(x, kind="abs").backward(), lambda: pairwise_max_cosine(x)):
            assert peak_bytes(call) <= buffer + 4 * (5 * n * d + 10 * n) + (1 << 18)
    buffers.release()


def good(*shape):
    return torch.randn(shape or (4, 3), requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pairwise_cosine([[1.0]], kind="abs"), TypeError, "x: expected a tensor, got list"),
        (lambda: pairwise_cosine(good(3), kind="abs"), ValueError, r"x: expected 2 dimensions .*\(3,\)"),
        (lambda: pairwise_cosine(good(0, 3), kind="abs"), ValueError, r"x: expected at least one row .*\(0, 3\)"),
        (lambda: pairwise_cosine(good(), good(2, 4), kind="abs"), ValueError, r"y: expected 3 columns .*\(2, 4\)"),
        (lambda: pairwise_cosine(good(), good().double(), kind="abs"), TypeError, "y: expected torch.float32 like x"),
        (lambda: pairwise_cosine(good(), good().to("meta"), kind="abs"), ValueError, "y: expected device cpu .*meta"),
        (lambda: pairwise_cosine(good(), good(0, 3), kind="abs"), ValueError, r"y: expected at least one row"),
        (lambda: pairwise_cosine(good().int(), kind="abs"), TypeError, "x: .*torch.int32"),
        (lambda: pairwise_cosine(good(), kind="max"), ValueError, "kind: expected one of 'mean', 'square', .*'max'"),
        (lambda: pairwise_cosine(good(), kind="relu", margin=float("nan")), ValueError, "margin: .*finite"),
        (lambda: pairwise_cosine(good(), kind="logmeanexp", temperature=0), ValueError, "temperature: .*above 0"),
        (lambda: pairwise_cosine(good(), kind="abs", eps=0), ValueError, "eps: .*above 0"),
        (lambda: pairwise_cosine(good(), kind="abs", skip_diagonal=1), TypeError, "skip_diagonal: .*True or False"),
        (lambda: pairwise_max_cosine(good(3, 0)), ValueError, "x: expected at least one row and one column"),
        (lambda: global_orthogonal_regularization(good(), reduction="mean"), ValueError, "reduction: .*'sum', 'none'"),
        (lambda: global_orthogonal_regularization(good(), mean_weight=None), TypeError, "mean_weight: .*number"),
        (lambda: global_orthogonal_regularization(good(5)), ValueError, "x: expected 2 dimensions"),
        (lambda: CosineRegularization(kind="cube"), ValueError, "kind: expected one of 'mean'"),
        (lambda: CosineRegularization(kind="relu", margin="1"), TypeError, "margin: expected a number"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_cannot_serve_says_so():
    with repdeg_fast.use_backend("cuda"), pytest.raises(RuntimeError, match="pairwise has no cuda kernel"):
        pairwise_cosine(good(), kind="abs")
