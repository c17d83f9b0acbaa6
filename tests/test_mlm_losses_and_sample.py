"""The joint form against the two functions it stands for."""

import copy
import sys

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch.utils.checkpoint import checkpoint

import repdeg_fast
from repdeg_fast import gumbel_mix, mlm_losses_and_sample, multi_layer_mlm_loss
from repdeg_fast.contracts.gumbel_mix import Drawn, Estimator, HeadLogits, Heads, Noise, Projection, Wanted
from repdeg_fast.ops import buffers, chunked_logits
from repdeg_fast.ops.gumbel_mix import operation
from repdeg_fast.ops.mlm_losses_and_sample import mlm_losses_and_sample as operator
from repdeg_fast.reference import gumbel_mix as definition

SHAPES = [
    (3, 37, 300, 24, 24),
    (1, 5, 129, 16, 9),
    (4, 1, 7, 8, 8),
    (2, 9, 1, 8, 8),
    (2, 0, 50, 8, 8),
]  # K, M, V, d, d_f
SEED = 99


class Problem:
    def __init__(self, shape, dtype=torch.float32, device="cpu", scale=1.0, bias=True):
        heads, rows, vocabulary, width, embedding_width = shape
        generator = torch.Generator().manual_seed(rows + vocabulary)

        def leaf(*size, scale=1.0):
            values = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype).requires_grad_()

        self.hidden_states = leaf(heads, rows, width)
        self.mixture_logits = leaf(rows, heads)
        self.weight = leaf(vocabulary, width, scale=scale * width**-0.5)
        self.bias = leaf(vocabulary) if bias else None
        self.embedding = leaf(vocabulary, embedding_width)
        self.target = torch.randint(vocabulary, (rows,), generator=generator).to(device)
        self.target[1::4] = -100
        self.upstream = torch.randn(rows, embedding_width, generator=generator).to(device)

    def leaves(self):
        named = (self.hidden_states, self.mixture_logits, self.weight, self.bias, self.embedding)
        return [tensor for tensor in named if tensor is not None]

    def joint(self, **options):
        return mlm_losses_and_sample(
            self.hidden_states, self.mixture_logits, self.weight, self.target, self.bias, self.embedding, seed=SEED,
            **options,
        )  # fmt: skip

    def separate(self, temperature=0.3, **options):
        head = (self.weight, self.target, self.bias)
        losses = multi_layer_mlm_loss(self.hidden_states, *head, **options)
        head = (self.mixture_logits, self.weight, self.bias, self.embedding)
        return losses, *gumbel_mix(self.hidden_states, *head, seed=SEED, temperature=temperature)

    def in_float64(self):
        """The same rounded inputs."""
        exact = copy.copy(self)
        for name in ("hidden_states", "mixture_logits", "weight", "bias", "embedding"):
            if getattr(self, name) is not None:
                setattr(exact, name, getattr(self, name).detach().cpu().double().requires_grad_())
        exact.target, exact.upstream = self.target.cpu(), self.upstream.cpu()
        return exact

    def results(self, outputs):
        """Losses, tokens, embeddings and the gradients of all leaves."""
        losses, token_ids, embeddings = outputs
        scalar = losses.sum() + (embeddings * self.upstream).sum()
        return losses, token_ids, embeddings, *torch.autograd.grad(scalar, self.leaves())


@pytest.fixture
def small_chunks(monkeypatch):
    """Buffers of a few positions."""
    monkeypatch.setattr(buffers, "LIMIT", {"cpu": 40_000, "cuda": 40_000})
    monkeypatch.setattr(chunked_logits, "FEWEST_ROWS", 8)


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_two_functions(place, shape, strategy, small_chunks):
    problem = Problem(shape, place.dtypes()[0], place.device)
    joint = problem.results(problem.joint(strategy=strategy))
    separate = problem.results(problem.separate(strategy=strategy))
    assert torch.equal(joint[1], separate[1])
    scale = separate[4].norm()
    for number, (one, other) in enumerate(zip(joint, separate, strict=True)):
        if number == 4 and scale < 1e-6:  # one token or one head: nothing to choose
            assert one.norm() < 1e-6
        elif number != 1 and one.numel():
            assert relative_error(one, other) <= 1e-5


def test_against_float64(place, small_chunks):
    problem = Problem((3, 20, 200, 16, 16), torch.float32, place.device)
    exact = Problem((3, 20, 200, 16, 16), torch.float64)
    exact.upstream = problem.upstream.cpu()
    with repdeg_fast.use_backend("reference"):
        truths = exact.results(exact.separate())
    results = problem.results(problem.joint(strategy="chunked"))
    assert torch.equal(results[1].cpu(), truths[1])
    for result, truth in zip(results[:1] + results[2:], truths[:1] + truths[2:], strict=True):
        assert relative_error(result, truth) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("vocabulary", [13, 45])
def test_a_vocabulary_that_ends_within_a_vector(place, vocabulary):
    """Its last tokens are those that all rows draw."""
    problem = Problem((3, 12, vocabulary, 8, 4), torch.float32, place.device)
    with torch.no_grad():
        problem.bias[-3:] += 12
    _, token_ids, _ = problem.joint(strategy="chunked")
    assert (token_ids >= vocabulary - 3).all()
    assert torch.equal(token_ids, problem.separate()[1])


def test_16_bits_sample_what_their_logits_say(place, small_chunks):
    """Tokens differ only where rounding decides; the mixture's gradient is that of the sample that was drawn."""
    rows = 20 if place.backend == "triton" and place.device == "cpu" else 100  # the interpreter is slow
    for dtype in set(place.dtypes()) & {torch.bfloat16, torch.float16}:
        problem = Problem((3, rows, 120, 16, 16), dtype, place.device)
        _, token_ids, _ = problem.joint(strategy="chunked")
        _, plain_ids, _ = problem.separate()
        assert (token_ids == plain_ids).double().mean() >= 0.97
        exact = problem.in_float64()
        with repdeg_fast.use_backend("reference"):
            _, same_ids, embeddings = exact.separate()
        same = token_ids.cpu() == same_ids
        truth = torch.autograd.grad((embeddings * exact.upstream).sum(), exact.mixture_logits)[0]
        _, _, embeddings = problem.joint(strategy="chunked")
        result = torch.autograd.grad((embeddings * problem.upstream).sum(), problem.mixture_logits)[0]
        assert relative_error(result.cpu()[same], truth[same]) <= 3 * TOLERANCE[dtype]  # h̄ is rounded too


def _drawn(rows, device="cpu"):
    return Drawn(torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, device=device))


def test_heads_may_lie_further_apart_than_32_bits_reach(place):
    """Of 4 GB, pages that nobody touches are not taken."""
    stride, vocabulary = 2**30, 40
    room = torch.empty(2 * stride + vocabulary, dtype=torch.float16, device=place.device)
    logits = room.as_strided((3, 1, vocabulary), (stride, vocabulary, 1))
    logits.copy_(torch.randn(logits.shape))
    mixture_logits, drawn, expected = torch.tensor([[0.2, 0.3, 0.5]]), _drawn(1, place.device), _drawn(1)
    noise = Noise(torch.tensor([SEED], device=place.device), 0.3)
    block = HeadLogits(logits, mixture_logits.to(place.device), None, 0)
    operation.kernels(place.backend, logits).sample_logits(drawn, block, noise)
    definition.sample_logits(expected, HeadLogits(logits.cpu(), mixture_logits, None, 0), Noise(noise.seed.cpu(), 0.3))
    assert drawn.token_ids.item() == expected.token_ids.item()
    assert relative_error(drawn.peak, expected.peak) <= 1e-5


def test_a_sample_of_rounded_logits_serves_the_backward_pass(place):
    """y is divided by what it adds up to, so that the drawn token's need only be near."""
    problem = Problem((2, 20, 200, 16, 16), torch.float32, place.device)
    hidden, mixture_logits, weight, bias, embedding = (tensor.detach() for tensor in problem.leaves())
    inputs = (Heads(hidden, mixture_logits), Projection(weight, bias), embedding)
    noise = Noise(torch.tensor([SEED], device=place.device), 0.3)
    kernels = operation.kernels(place.backend, hidden, weight)
    _, token_ids, peak = kernels.forward(*inputs, noise, hard=True)
    gradients = [
        kernels.backward(
            problem.upstream, *inputs, Drawn(token_ids, error * peak), noise, Estimator(True, 1.0), Wanted(True, False)
        ).mixture_logits
        for error in (1.0, 0.75)
    ]
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_any_temperature_of_a_sample_of_rounded_logits(place, scale, small_chunks):
    """Logits of the sample and of the backward pass may differ by their rounding, over τ. Where the same token is
    drawn, gradients are as good as those of gumbel_mix; where not, a token above the drawn one counts as equal."""
    rows = 6 if place.backend == "triton" and place.device == "cpu" else 30
    for dtype in set(place.dtypes()) & {torch.bfloat16, torch.float16}:
        problem = Problem((3, rows, 200, 16, 16), dtype, place.device, scale)
        exact = problem.in_float64()
        for temperature in (1e-30, 1e-3, 0.3):
            _, token_ids, embeddings = problem.joint(strategy="chunked", temperature=temperature)
            _, plain_ids, plain = problem.separate(temperature=temperature)
            with repdeg_fast.use_backend("reference"):
                _, true_ids, truth = exact.separate(temperature=temperature)
            (true,) = torch.autograd.grad((truth * exact.upstream).sum(), exact.mixture_logits)
            gradient, expected = (
                torch.autograd.grad((e * problem.upstream).sum(), problem.mixture_logits)[0].cpu().double()
                for e in (embeddings, plain)
            )
            assert gradient.isfinite().all()
            assert (token_ids == plain_ids).double().mean() >= 0.8
            same = (token_ids == plain_ids).cpu() & (token_ids.cpu() == true_ids)
            error, allowed = (gradient - true)[same].norm(), (expected - true)[same].norm()
            assert error <= 1.5 * allowed + TOLERANCE[dtype] * true[same].norm()


def test_tokens_may_be_excluded_by_the_tile(place):
    """Triton takes some thousand logits at a time."""
    logits, mixture_logits = torch.randn(2, 5, 4500), torch.rand(5, 2)
    noise = Noise(torch.tensor([SEED], device=place.device), 0.3)
    for excluded in (slice(None, 4200), slice(4000, None), slice(None)):
        bias = torch.zeros(4500)
        bias[excluded] = -float("inf")
        drawn, expected = _drawn(5, place.device), _drawn(5)
        block = HeadLogits(*(tensor.to(place.device) for tensor in (logits, mixture_logits, bias)), 2)
        operation.kernels(place.backend, block.logits).sample_logits(drawn, block, noise)
        definition.sample_logits(expected, HeadLogits(logits, mixture_logits, bias, 2), Noise(noise.seed.cpu(), 0.3))
        if excluded == slice(None):
            assert not drawn.peak.isfinite().any()
        else:
            assert torch.equal(drawn.token_ids.cpu(), expected.token_ids)
            assert relative_error(drawn.peak, expected.peak) <= 1e-5


def test_one_product_with_the_vocabulary_serves_both(monkeypatch):
    problem = Problem(SHAPES[0])
    functional = sys.modules["repdeg_fast.functional.mlm_losses_and_sample"]  # the package exports its function
    monkeypatch.setattr(functional, "gumbel_mix", lambda *_: pytest.fail("a second sweep"))
    problem.joint(strategy="chunked")
    with pytest.raises(pytest.fail.Exception, match="a second sweep"):
        problem.joint(strategy="streaming")


def test_checkpointing_draws_the_same_sample():
    """The first pass of a reentrant checkpoint needs no gradient; the sample must not depend on that."""
    problem, drawn = Problem((3, 1000, 400, 16, 16), torch.bfloat16), []

    def step(hidden_states):
        problem.hidden_states = 4 * hidden_states
        losses, token_ids, embeddings = problem.joint(strategy="chunked")
        drawn.append(token_ids)
        return losses.sum() + embeddings.float().sum()

    checkpoint(step, problem.hidden_states, use_reentrant=True).backward()
    assert torch.equal(*drawn)


@pytest.mark.parametrize("rows", [64, 61])  # 61: the last chunk has a single position
def test_chunks_do_not_change_the_sample(rows, monkeypatch):
    problem = Problem((3, rows, 500, 16, 16))
    expected = problem.results(problem.joint(strategy="chunked"))
    monkeypatch.setattr(chunked_logits, "FEWEST_ROWS", 1)
    for limit in (1, 20_000, 100_000):
        monkeypatch.setattr(buffers, "LIMIT", {"cpu": limit, "cuda": limit})
        results = problem.results(problem.joint(strategy="chunked"))
        assert torch.equal(results[1], expected[1])
        assert all(
            relative_error(a, b) <= 1e-6 for a, b in zip(results, expected, strict=True) if a.is_floating_point()
        )
        again = problem.results(problem.joint(strategy="chunked"))
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))  # the same bits


def test_unequal_weights_of_the_losses():
    problem = Problem(SHAPES[0])
    weights = torch.tensor([1.0, 0.0, 2.0])
    gradients = [
        torch.autograd.grad((outputs[0] * weights).sum(), (problem.hidden_states, problem.weight, problem.bias))
        for outputs in (problem.joint(strategy="chunked"), problem.separate())
    ]
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(*gradients, strict=True))


def test_one_head_needs_no_mixture(place):
    problem = Problem(SHAPES[1], place.dtypes()[0], place.device)
    arguments = (problem.weight, problem.target, problem.bias, problem.embedding)
    bare = mlm_losses_and_sample(problem.hidden_states, None, *arguments, seed=SEED, strategy="chunked")
    for one, other in zip(bare, problem.joint(strategy="chunked"), strict=True):
        assert torch.equal(one, other)


def test_layers_may_come_apart_and_without_gradients():
    problem = Problem(SHAPES[0], bias=False)
    arguments = (problem.mixture_logits, problem.weight, problem.target)
    with torch.no_grad():
        apart = mlm_losses_and_sample(list(problem.hidden_states), *arguments, seed=SEED)
        losses = multi_layer_mlm_loss(problem.hidden_states, *arguments[1:])
        token_ids, embeddings = gumbel_mix(problem.hidden_states, *arguments[:2], seed=SEED)
    for one, other in zip(apart, (losses, token_ids, embeddings), strict=True):
        assert torch.equal(one, other)


def test_not_a_number_shows_in_the_embedding(place):
    problem = Problem(SHAPES[0], torch.float32, place.device)
    with torch.no_grad():
        problem.hidden_states[1, 3] = float("nan")
    losses, token_ids, embeddings = problem.joint(strategy="chunked")
    assert losses.isnan().tolist() == [False, True, False]
    assert token_ids.min() >= 0
    assert token_ids.max() < 300
    assert embeddings.isnan().any(dim=1).nonzero().flatten().tolist() == [3]


def test_one_graph_for_any_temperature(place):
    """Where tokens are kept at small temperatures, there is room for them, which must not be looked at otherwise."""
    problem = Problem((2, 3, 40, 8, 8), device=place.device)

    def gradient(temperature):
        _, _, embeddings = problem.joint(strategy="chunked", temperature=temperature)
        return (embeddings * problem.upstream).sum()

    torch._dynamo.reset()
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True, dynamic=True)
    for temperature, same in ((0.05, False), (2.0, True)):
        with torch._dynamo.config.patch(error_on_recompile=same):
            found = torch.autograd.grad(compiled(temperature), problem.mixture_logits)
        (expected,) = torch.autograd.grad(gradient(temperature), problem.mixture_logits)
        assert relative_error(*found, expected) <= 1e-5


@pytest.mark.slow
def test_compiles_to_one_graph():
    problem = Problem(SHAPES[0])

    def loss(*leaves):
        hidden, mixture, weight, bias, embedding = leaves
        losses, _, embeddings = mlm_losses_and_sample(
            hidden, mixture, weight, problem.target, bias, embedding, seed=SEED
        )
        return losses.sum() + (embeddings * problem.upstream).sum()

    eager = torch.autograd.grad(loss(*problem.leaves()), problem.leaves())
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*problem.leaves()), problem.leaves())
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(compiled, eager, strict=True))


@pytest.mark.slow
def test_operator_is_registered_right():
    problem = Problem(SHAPES[0])
    arguments = (problem.hidden_states.flatten(0, 1), problem.weight, problem.target, problem.bias)
    sampling = (None, problem.mixture_logits.detach(), torch.tensor([SEED]), 0.3, False, 0)
    options = (-100, 0.0, 0.0, 0.0, 3, 0.0, "mean", None, torch.float32, [True] * 3, "auto")
    torch.library.opcheck(operator.overload, (*arguments, *sampling, *options))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(4)}, TypeError, "target: expected a tensor of class indices"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target: expected shape \(4,\)"),
        ({"mixture_logits": torch.randn(4, 3)}, ValueError, r"mixture_logits: expected shape \(4, 2\)"),
        ({"mixture_logits": None}, ValueError, "mixture_logits: .*None"),
        ({"embedding": torch.randn(19, 8)}, ValueError, r"embedding: expected shape \(20, d_f\)"),
        ({"hidden_states": torch.randn(4, 8)}, ValueError, "hidden_states: expected 3 dimensions"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
        ({"gradient_scale": float("inf")}, ValueError, "gradient_scale: expected a finite number"),
        ({"strategy": "fast"}, ValueError, "strategy: expected one of"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "hidden_states": torch.randn(2, 4, 8),
        "mixture_logits": torch.randn(4, 2),
        "weight": torch.randn(20, 8),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        mlm_losses_and_sample(**(arguments | change))
