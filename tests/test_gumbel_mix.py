"""Gumbel mixing: every backend against the published formula in float64."""

import copy
import itertools
from collections import deque

import pytest
import torch
from gumbel_mix_cases import SEED, Problem
from helpers import TOLERANCE, relative_error

import repdeg_fast
from repdeg_fast import gradient_reversal, gumbel_mix, mlm_losses_and_sample
from repdeg_fast.ops.gumbel_mix import operation  # noqa: F401

SHAPES = [  # K, M, V, d, d_f
    (3, 5, 97, 24, 24),
    (2, 33, 1000, 40, 16),
    (1, 3, 7, 5, 9),
    (3, 4, 1, 8, 8),
    (2, 70, 129, 64, 33),
    (4, 1, 513, 130, 20),
]


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_published_formula(place, shape, hard):
    for dtype in place.dtypes():
        for temperature in (0.3, 2.0):
            problem = Problem(shape, dtype, place.device)
            token_ids, *results = problem.run(hard=hard, temperature=temperature)
            true_ids, *truths = problem.expected(hard, temperature)
            assert torch.equal(token_ids.cpu(), true_ids)
            for result, truth in zip(results, truths, strict=True):
                assert result.dtype == dtype
                if shape[2] > 1 and (truth is not truths[1] or shape[0] > 1):
                    assert relative_error(result, truth) <= TOLERANCE[dtype]
                else:  # one token or one head leaves nothing to choose: the gradient of the mixture is zero
                    assert relative_error(result, truth) <= (TOLERANCE[dtype] if truth.norm() > 1e-9 else 1e-4)


def test_gradient_equals_autograd_of_the_formula_in_float64():
    for temperature in (0.1, 0.3, 1.0):
        problem = Problem((3, 40, 600, 32, 24), torch.float64)
        with repdeg_fast.use_backend("reference"):
            results = problem.run(temperature=temperature)
        for result, truth in zip(results, problem.expected(True, temperature), strict=True):
            assert relative_error(result, truth) <= 1e-9


def test_embedding_defaults_to_the_weight(place):
    problem = Problem((2, 20, 90, 16, 16), place.dtypes()[0], place.device, bias=False, tied=True)
    true_ids, value, *gradients = problem.expected(True, 0.3)
    weight = problem.weight.detach().clone().requires_grad_()
    token_ids, embeddings = gumbel_mix(
        problem.hidden_states, problem.mixture_logits, weight, seed=SEED, gradient_scale=1.0
    )
    grads = torch.autograd.grad((embeddings * problem.upstream).sum(), (problem.mixture_logits, weight))
    assert torch.equal(token_ids.cpu(), true_ids)
    for result, truth in zip((embeddings, *grads), (value, *gradients), strict=True):
        assert relative_error(result, truth) <= 1e-5


def test_common_part_of_the_embedding_cancels(place):
    """Degenerate embeddings share a large direction, which gives every token the same product with r."""
    problem = Problem((2, 16, 300, 24, 24), torch.float32, place.device)
    problem.embedding = (problem.embedding.detach() + 30).requires_grad_()
    *_, grad, _ = problem.run()
    *_, truth, _ = problem.expected(True, 0.3)
    assert relative_error(grad, truth) <= 1e-5


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_the_padding_row_gets_no_gradient_where_it_is_sampled(place, hard):
    problem = Problem((2, 12, 50, 16, 8), torch.float32, place.device)
    token_ids, _, mixture, embedding = problem.run(hard=hard)
    row = int(token_ids[0])
    assert embedding[row].any()
    same_ids, _, same_mixture, without = problem.run(hard=hard, padding_idx=row - 50)  # counted from the end
    assert torch.equal(same_ids, token_ids)
    assert torch.equal(same_mixture, mixture)
    embedding[row] = 0
    assert torch.equal(without, embedding)


def test_gradient_scale_turns_the_mixture_only(place):
    problem = Problem((3, 12, 200, 16, 8), torch.float32, place.device)
    *_, mixture, embedding = problem.run()
    *_, reversed_mixture, same_embedding = problem.run(gradient_scale=-2.0)
    assert relative_error(reversed_mixture, -2 * mixture) <= 1e-6
    assert torch.equal(embedding, same_embedding)


def test_logits_path_gets_no_gradient():
    problem = Problem((2, 8, 50, 16, 16))
    for tensor in (problem.hidden_states, problem.bias):
        tensor.requires_grad_()
    weight = problem.weight.requires_grad_()
    _, embeddings = gumbel_mix(*problem.tensors())
    hidden, weight_grad, bias = torch.autograd.grad(
        embeddings.sum(), (problem.hidden_states, weight, problem.bias), allow_unused=True
    )
    assert hidden is None
    assert weight_grad is None
    assert bias is None


def test_one_head_needs_no_mixture(place):
    problem = Problem((1, 9, 120, 16, 8), torch.float32, place.device)
    token_ids, embeddings, _, grad = problem.run()
    bare_ids, bare = gumbel_mix(problem.hidden_states, None, *problem.tensors()[2:], seed=SEED)
    (bare_grad,) = torch.autograd.grad((bare * problem.upstream).sum(), problem.embedding)
    assert torch.equal(bare_ids, token_ids)
    assert torch.equal(bare, embeddings)
    assert torch.equal(bare_grad, grad)
    assert not bare_ids.requires_grad


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_no_rows(place, hard):
    problem = Problem((2, 0, 40, 8, 6), torch.float32, place.device)
    token_ids, embeddings, mixture, embedding = problem.run(hard=hard)
    assert token_ids.shape == (0,)
    assert embeddings.shape == (0, 6)
    assert mixture.shape == (0, 2)
    assert embedding.shape == (40, 6)
    assert not embedding.any()


@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "offset"])
def test_strides(place, view):
    problem = Problem((2, 10, 48, 24, 24), torch.float32, place.device)
    strided = {
        "transposed": lambda x: x.T.contiguous().T,
        "columns": lambda x: x.repeat_interleave(3, dim=1)[:, ::3],
        "rows": lambda x: x.repeat_interleave(2, dim=0)[::2],
        "offset": lambda x: torch.cat([x[:1], x])[1:],
    }[view]
    contiguous = problem.run(hard=False)
    problem.weight, problem.embedding = strided(problem.weight), strided(problem.embedding.detach()).requires_grad_()
    problem.hidden_states = strided(problem.hidden_states.flatten(0, 1)).unflatten(0, (2, 10))
    for result, truth in zip(problem.run(hard=False), contiguous, strict=True):
        assert relative_error(result, truth) <= 1e-5


def _strided(matrix):
    return matrix.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_(matrix.requires_grad)


def _narrow_embedding(problem):
    problem.embedding = problem.embedding.detach().half().requires_grad_()
    problem.upstream = problem.upstream.half()


def _one_head(problem):
    problem.hidden_states = problem.hidden_states[1:]
    problem.mixture_logits = problem.mixture_logits.detach()[:, 1:].requires_grad_()


UNUSUAL = {
    "weight by columns": lambda p: setattr(p, "weight", p.weight.t().contiguous().t()),
    "strided weight": lambda p: setattr(p, "weight", _strided(p.weight)),
    "strided hidden states": lambda p: setattr(p, "hidden_states", _strided(p.hidden_states)),
    "strided mixture": lambda p: setattr(p, "mixture_logits", _strided(p.mixture_logits)),
    "strided embedding": lambda p: setattr(p, "embedding", _strided(p.embedding)),
    "strided bias": lambda p: setattr(p, "bias", _strided(p.bias)),
    "narrow embedding": _narrow_embedding,
    "narrow bias": lambda p: setattr(p, "bias", p.bias.half()),
    "excluded tokens": lambda p: p.bias[:100].fill_(-float("inf")),
    "expanded upstream": lambda p: setattr(p, "upstream", p.upstream[:1, :1].expand(p.upstream.shape)),
    "one head": _one_head,
}


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_what_is_unusual_in_combination(place, hard):
    """Plackett and Burman's twelve runs of eleven factors: any two come together, apart, and not at all."""
    pattern = deque([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0])
    for _ in UNUSUAL:
        names = list(itertools.compress(UNUSUAL, pattern))
        pattern.rotate()
        problem = Problem((2, 5, 140, 16, 12), torch.float32, place.device)
        for name in names:
            UNUSUAL[name](problem)
        token_ids, *results = problem.run(hard=hard, temperature=0.7)
        true_ids, *truths = problem.expected(hard, 0.7)
        tolerance = TOLERANCE[problem.embedding.dtype]
        assert torch.equal(token_ids.cpu(), true_ids), names
        for result, truth in zip(results, truths, strict=True):
            nothing = truth.norm() < 1e-9  # one head leaves nothing to choose
            assert relative_error(result, truth) <= (1e-4 if nothing else tolerance), names


def test_weight_of_another_dtype_is_multiplied_in_that_of_the_hidden_states(place):
    narrow = torch.float16 if place.device == "cpu" else torch.bfloat16
    problem = Problem((2, 10, 80, 16, 16), narrow, place.device)
    same = problem.run()
    problem.weight = problem.weight.float()
    problem.embedding = problem.embedding.detach().float().requires_grad_()
    problem.upstream = problem.upstream.float()
    wider = problem.run()
    assert torch.equal(same[0], wider[0])
    assert wider[1].dtype == torch.float32
    assert relative_error(wider[2], same[2]) <= 1e-2
    softly = problem.run(hard=False)
    problem.weight = problem.weight + 2**-14 * problem.weight.abs()  # rounded, it is the same
    for one, other in zip(problem.run(hard=False), softly, strict=True):
        assert torch.equal(one, other)


def test_drawn_values_of_an_embedding_by_columns(place):
    problem = Problem((2, 10, 48, 24, 9), torch.float32, place.device)
    problem.embedding = problem.embedding.detach().T.contiguous().T.requires_grad_()
    token_ids, values, *_ = problem.run()
    assert torch.equal(values, problem.embedding[token_ids])


def test_gradient_reversal():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(gradient_reversal(x), x)
    (grad,) = torch.autograd.grad(gradient_reversal(x, -0.5).sum(), x)
    assert torch.equal(grad, torch.full_like(x, -0.5))
    with pytest.raises(TypeError, match="scale: expected a number, got str"):
        gradient_reversal(x, "1")


@pytest.mark.parametrize("hard", [True, False])
def test_positions_of_a_larger_batch(place, hard):
    """Part of a batch draws, and learns from, what it would in the whole."""
    whole = Problem((2, 7, 40, 8, 6), device=place.device)
    some = copy.copy(whole)
    some.hidden_states, some.upstream = whole.hidden_states[:, 3:], whole.upstream[3:]
    some.mixture_logits = whole.mixture_logits.detach()[3:].requires_grad_()
    token_ids, values, grad_mixture, _ = whole.run(hard=hard)
    got = some.run(hard=hard, first_position=3)
    assert torch.equal(got[0], token_ids[3:])
    assert relative_error(got[1], values[3:]) <= 1e-6
    assert relative_error(got[2], grad_mixture[3:]) <= 1e-5
    joint = mlm_losses_and_sample(
        some.hidden_states,
        some.mixture_logits,
        some.weight,
        got[0],
        some.bias,
        some.embedding,
        seed=SEED,
        first_position=3,
    )
    assert torch.equal(joint[1], token_ids[3:])
