"""Gumbel mixing where numbers are large, small or not there: temperatures, sizes of logits, excluded tokens."""

import itertools

import pytest
import torch
from gumbel_mix_cases import SEED, Problem
from helpers import TOLERANCE, relative_error

from repdeg_fast._mixture import mix, mix_backward
from repdeg_fast.contracts.gumbel_mix import Drawn, Estimator, Heads, Noise, Projection, Wanted
from repdeg_fast.ops.gumbel_mix import operation
from repdeg_fast.reference import philox

either = pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])


@either
@pytest.mark.parametrize("scale", [2.0, 100.0, 1e4])
def test_no_worse_than_eager_pytorch_at_any_temperature(place, scale, hard):
    """The published formula in fp32 on the same inputs, in several orders of summation: where two tokens nearly tie,
    rounding decides between them, and one order alone may be lucky."""
    orders = [torch.randperm(24) for _ in range(4)]
    for dtype, temperature in itertools.product(place.dtypes(), (1e-30, 1e-8, 1e-6, 1e-4, 1e-2, 0.3, 10.0)):
        if dtype == torch.float64:
            continue
        problem = Problem((3, 9, 131, 24, 16), dtype, place.device, scale=scale)
        token_ids, *results = problem.run(hard=hard, temperature=temperature)
        true_ids, *truths = problem.expected(hard, temperature)
        eager = [problem.expected(hard, temperature, torch.float32, order)[1:] for order in orders]
        assert torch.equal(token_ids.cpu(), true_ids)
        for number, (result, truth) in enumerate(zip(results, truths, strict=True)):
            errors = [(other[number].double() - truth).norm(dim=1) for other in eager]
            bound = 3 * torch.stack(errors).amax(dim=0).norm() + TOLERANCE[dtype] * truth.norm()
            if number == 1:  # where one token has all the weight, nothing is left of the mixture's gradient
                bound += TOLERANCE[dtype] / 10 * problem.upstream.norm().cpu()
            assert (result.cpu().double() - truth).norm() <= bound


@pytest.mark.parametrize("temperature", [1e-30, 1e-8])
def test_a_token_above_the_drawn_one_counts_as_equal(place, temperature):
    """Rounding may put one there that the sweep that drew did not see, far above at a small τ. The reference, whose
    y is a softmax, need not know."""
    problem = Problem((2, 9, 131, 24, 16), torch.float32, place.device)
    hidden, mixture_logits, weight, bias, embedding = (tensor.detach() for tensor in problem.tensors())
    noise = Noise(torch.tensor([SEED], device=place.device), temperature)
    s = mix(hidden, mixture_logits) @ weight.T + bias + philox.gumbel(noise.seed, range(9), range(131))
    best, second = s.topk(2).indices.t().contiguous()
    inputs = (Heads(hidden, mixture_logits), Projection(weight, bias), embedding)
    sample = (Drawn(second, torch.ones_like(s[:, 0])), noise)
    kernels = operation.kernels(place.backend, hidden, weight)
    wanted = Wanted(mixture_logits=True, embedding=False)
    gradient, _ = kernels.backward(problem.upstream, *inputs, *sample, Estimator(True, 1.0), wanted)
    if place.backend == "reference":
        assert gradient.norm() <= 1e-6
    else:
        products = ((embedding[best] - embedding[second]) * problem.upstream).sum(dim=1, keepdim=True)
        truth = mix_backward(products / 4 * (weight[best] - weight[second]), hidden, mixture_logits)
        assert relative_error(gradient * temperature, truth) <= 1e-5


@either
@pytest.mark.parametrize(
    "excluded", [slice(None, 260), slice(130, None), slice(64, 256)], ids=["first", "last", "inner"]
)
def test_whole_tiles_of_excluded_tokens(place, excluded, hard):
    for dtype in place.dtypes():
        problem = Problem((2, 9, 400, 16, 12), dtype, place.device)
        problem.bias[excluded] = -float("inf")
        token_ids, *results = problem.run(hard=hard)
        true_ids, *truths = problem.expected(hard, 0.3)
        assert torch.equal(token_ids.cpu(), true_ids)
        assert all(relative_error(a, b) <= TOLERANCE[dtype] for a, b in zip(results, truths, strict=True))
        if not hard:
            assert not results[2][excluded].any()


@either
def test_nothing_left_to_draw(place, hard):
    problem = Problem((2, 9, 300, 16, 12), torch.float32, place.device)
    problem.bias[:] = -float("inf")
    token_ids, embeddings, mixture, _ = problem.run(hard=hard)
    assert ((token_ids >= 0) & (token_ids < 300)).all()
    assert embeddings.isnan().all()
    assert mixture.isnan().all()


@either
@pytest.mark.parametrize("change", ["none", "first chunk excluded", "other dtypes and strides"])
def test_several_chunks_of_the_vocabulary_on_the_cpu(change, hard):
    """2,100 rows leave room for 3,994 tokens at a time: three chunks. A few rows suffice for the truth."""
    problem = Problem((2, 2100, 8209, 8, 6))
    problem.upstream[7:] = 0
    tolerance = 1e-5
    if change == "first chunk excluded":
        problem.bias[:4100] = -float("inf")
    elif change == "other dtypes and strides":
        problem.weight = problem.weight.T.contiguous().T
        problem.embedding = problem.embedding.detach().half().repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
        problem.hidden_states = problem.hidden_states.repeat_interleave(2, dim=1)[:, ::2]
        problem.upstream, tolerance = problem.upstream.half(), TOLERANCE[torch.float16]
    for temperature in (0.3, 2.0):
        token_ids, value, mixture, embedding = problem.run(hard=hard, temperature=temperature)
        true_ids, *truths = problem.first_rows(7).expected(hard, temperature)
        assert torch.equal(token_ids[:7], true_ids)
        for result, truth in zip((value[:7], mixture[:7], embedding), truths, strict=True):
            assert relative_error(result, truth) <= tolerance
