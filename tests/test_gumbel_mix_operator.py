"""Gumbel mixing as PyTorch sees it: operator checks, compilation, derivatives, memory."""

import pytest
import torch
from gumbel_mix_cases import SEED, Problem
from helpers import relative_error, saved_bytes

import repdeg_fast
from repdeg_fast import gradient_reversal, gumbel_mix
from repdeg_fast.ops.gumbel_mix import gumbel_mix as operator
from repdeg_fast.ops.gumbel_mix import gumbel_value, operation


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_of_the_soft_value(backend):
    problem = Problem((2, 3, 20, 4, 3), torch.float64)

    def value(mixture_logits, embedding):
        hidden, _, weight, bias, _ = problem.tensors()
        options = {"hard": False, "gradient_scale": 1.0, "temperature": 0.7, "seed": SEED}
        return gumbel_mix(hidden, mixture_logits, weight, bias, embedding, **options)[1]

    with repdeg_fast.use_backend(backend):
        assert torch.autograd.gradcheck(value, (problem.mixture_logits, problem.embedding))


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_opcheck(hard):
    problem = Problem((2, 5, 30, 8, 6))
    seed = torch.tensor([SEED])
    torch.library.opcheck(operator.overload, (*problem.tensors(), seed, 0.3, 0, hard, -1.0, 3, "auto"))
    _, token_ids, peak = operator(*problem.tensors(), seed, 0.3, 0, hard, -1.0, 3, "auto")
    torch.library.opcheck(
        gumbel_value.overload, (*problem.tensors(), token_ids, peak, None, seed, 0.3, 0, -1.0, 3, "auto")
    )


def test_autocast_changes_nothing(place):
    """Products are of the dtype of the hidden states."""
    problem = Problem((2, 5, 30, 8, 6), device=place.device)
    for hard in (True, False):
        plain = problem.run(hard=hard)
        with torch.autocast(place.device, torch.bfloat16):
            token_ids, values = gumbel_mix(*problem.tensors(), hard=hard, seed=SEED, gradient_scale=1.0)
            leaves = (problem.mixture_logits, problem.embedding)
            gradients = torch.autograd.grad((values * problem.upstream).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(plain, (token_ids, values, *gradients), strict=True))


@pytest.mark.slow
def test_compiles_to_one_graph():
    problem = Problem((2, 16, 120, 8, 8))

    def loss(mixture_logits, embedding, seed):
        hidden, _, weight, bias, _ = problem.tensors()
        _, embeddings = gumbel_mix(hidden, mixture_logits, weight, bias, embedding, seed=seed)
        return (gradient_reversal(embeddings) * problem.upstream).sum()

    leaves = (problem.mixture_logits, problem.embedding)
    compiled = torch.compile(loss, fullgraph=True)
    for seed in (SEED, torch.tensor([SEED])):
        eager = torch.autograd.grad(loss(*leaves, seed), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves, seed), leaves), eager, strict=True):
            assert relative_error(a, b) <= 1e-6
    assert compiled(*leaves, None).isfinite()


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_gradients_share_no_memory(place, hard):
    """Two steps that accumulate must not add to the same memory, nor write into what comes from above."""
    problem = Problem((2, 5, 30, 8, 8), device=place.device)
    token_ids, embeddings = gumbel_mix(*problem.tensors(), hard=hard)
    above = torch.randn_like(embeddings)
    gradients = torch.autograd.grad(embeddings, (problem.mixture_logits, problem.embedding), above)
    tensors = (*gradients, *problem.tensors(), above, embeddings, token_ids)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_saves_one_token_and_one_number_a_row():
    problem = Problem((3, 64, 200, 32, 32))
    seed = torch.tensor([SEED])
    inputs = [tensor for tensor in (*problem.tensors(), seed) if tensor is not None]
    assert saved_bytes(lambda: gumbel_mix(*problem.tensors(), seed=seed), *inputs) <= 12 * 64


def test_memory_stays_within_the_buffers():
    """AMOS-base on a CPU in fp32: eager PyTorch would take over a gigabyte."""
    from torch.profiler import ProfilerActivity, profile

    problem = Problem((3, 512, 30_522, 64, 64))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        problem.run()
    events = sorted(
        (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    held = torch.tensor([event.nbytes() for event in events]).cumsum(0)
    gradient = problem.embedding.numel() * 4
    assert held.max() - gradient <= 64 << 20


def test_served_by_a_kernel_here():
    assert operation.unavailable("cpu", "cpu") is None or "compil" in operation.unavailable("cpu", "cpu")
