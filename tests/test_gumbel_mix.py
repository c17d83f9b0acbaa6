"""Gumbel mixing: every backend against the published formula in float64."""

import math

import pytest
import torch
from helpers import TOLERANCE, relative_error, saved_bytes
from torch import nn

import repdeg_fast
from repdeg_fast import GumbelMixture, gradient_reversal, gumbel_mix
from repdeg_fast.ops.gumbel_mix import gumbel_sample, gumbel_value, operation
from repdeg_fast.reference import gumbel_mix as definition
from repdeg_fast.reference import philox

SHAPES = [  # K, M, V, d, d_f
    (3, 5, 97, 24, 24),
    (2, 33, 1000, 40, 16),
    (1, 3, 7, 5, 9),
    (3, 4, 1, 8, 8),
    (2, 70, 129, 64, 33),
    (4, 1, 513, 130, 20),
]
SEED = 1234


class Problem:
    """Inputs of one call, and what the published formula makes of them in float64."""

    def __init__(self, shape, dtype=torch.float32, device="cpu", bias=True, tied=False):
        heads, rows, vocabulary, width, embedding_width = shape
        generator = torch.Generator().manual_seed(rows * vocabulary)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

        self.hidden_states = normal(heads, rows, width)
        self.mixture_logits = normal(rows, heads).requires_grad_()
        self.weight = normal(vocabulary, width, scale=2 / math.sqrt(width))
        self.bias = normal(vocabulary) if bias else None
        self.embedding = self.weight if tied else normal(vocabulary, embedding_width)
        self.embedding.requires_grad_()
        self.upstream = normal(rows, self.embedding.shape[1])

    def tensors(self):
        return (self.hidden_states, self.mixture_logits, self.weight, self.bias, self.embedding)

    def run(self, **options):
        """Token ids, embeddings, gradients of the mixture logits and of the embedding."""
        options = {"seed": SEED, "gradient_scale": 1.0} | options
        token_ids, embeddings = gumbel_mix(*self.tensors(), **options)
        leaves = (self.mixture_logits, self.embedding)
        return token_ids, embeddings, *torch.autograd.grad((embeddings * self.upstream).sum(), leaves)

    def expected(self, hard, temperature):
        """Of the formula as published, K logits mixed. 16-bit hidden states are mixed and rounded first, as every
        backend does: else the comparison would be with other logits."""
        hidden, logits, weight, bias, embedding = (
            None if tensor is None else tensor.detach().cpu().double() for tensor in self.tensors()
        )
        logits.requires_grad_()
        embedding.requires_grad_()
        if self.hidden_states.element_size() < 4:
            hidden = hidden + (
                definition.mix(self.hidden_states, self.mixture_logits.detach()).cpu().double()
                - definition.mix(hidden, logits.detach())
            )
        seed = torch.tensor([SEED])
        token_ids, value = definition.gumbel_mix(hidden, logits, weight, bias, embedding, seed, temperature, hard)
        return token_ids, value, *torch.autograd.grad((value * self.upstream.cpu().double()).sum(), (logits, embedding))


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


def test_samples_follow_the_softmax(place):
    """Chi-square of the frequencies over rows of equal logits, for two hidden states of very different entropy."""
    rows, vocabulary = (20_000, 40) if (place.backend, place.device) != ("triton", "cpu") else (2_000, 12)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(vocabulary, 6, generator=generator)
    for scale in (0.2, 1.5):
        hidden = torch.randn(6, generator=generator) * scale
        hidden_states = hidden.expand(1, rows, 6).to(place.device)
        token_ids, _ = gumbel_mix(hidden_states, None, weight.to(place.device), seed=7)
        probability = (weight.double() @ hidden.double()).softmax(0)
        expected = rows * probability
        counts = torch.bincount(token_ids.cpu(), minlength=vocabulary).double()
        rare = expected < 5  # the statistic needs a few expected samples a cell: rare tokens share one
        merge = lambda x: torch.cat([x[~rare], x[rare].sum().view(1)])  # noqa: B023, E731
        statistic = ((merge(counts) - merge(expected)) ** 2 / merge(expected).clamp_min(1)).sum()
        freedom = (~rare).sum()
        assert statistic < freedom + 4.5 * math.sqrt(2 * freedom)


def test_same_tokens_on_every_backend_up_to_ties():
    """Where two backends differ, their tokens' perturbed logits must be equal to within rounding."""
    problem = Problem((3, 2000, 5000, 16, 8))
    chosen = {}
    for backend in ("reference", "cpu"):
        with repdeg_fast.use_backend(backend):
            chosen[backend], _ = gumbel_mix(*problem.tensors(), seed=SEED)
    different = (chosen["reference"] != chosen["cpu"]).nonzero().flatten()
    assert len(different) <= 1e-4 * 2000
    mixed = definition.mix(problem.hidden_states.double(), problem.mixture_logits.detach().double())
    z = mixed @ problem.weight.double().T + problem.bias.double()
    z += philox.gumbel(torch.tensor([SEED]), range(2000), range(5000), dtype=torch.float64)
    true = z.argmax(dim=1)
    for token_ids in chosen.values():
        gap = (z.gather(1, true[:, None]) - z.gather(1, token_ids[:, None])).flatten()
        assert (token_ids == true).double().mean() >= 0.9999
        assert gap.max() <= 1e-5  # a tie: the logits are about 10, rounded to 1e-6


def test_seed_replays_and_differs(place):
    problem = Problem((2, 64, 500, 16, 8), torch.float32, place.device)
    seed = torch.tensor([SEED], device=place.device)
    first = problem.run()
    assert all(torch.equal(a, b) for a, b in zip(first, problem.run(), strict=True))  # the same bits
    assert all(torch.equal(a, b) for a, b in zip(first, problem.run(seed=seed), strict=True))
    assert not torch.equal(first[0], problem.run(seed=SEED + 1)[0])
    torch.manual_seed(3)
    drawn = problem.run(seed=None)[0]
    assert not torch.equal(drawn, problem.run(seed=None)[0])
    torch.manual_seed(3)
    assert torch.equal(drawn, problem.run(seed=None)[0])


def test_checkpointing_draws_the_same_sample():
    problem = Problem((2, 32, 300, 16, 16))

    def loss(mixture_logits):
        _, embeddings = gumbel_mix(problem.hidden_states, mixture_logits, *problem.tensors()[2:])
        return (embeddings * problem.upstream).sum()

    torch.manual_seed(0)
    plain = torch.autograd.grad(loss(problem.mixture_logits), problem.mixture_logits)[0]
    torch.manual_seed(0)
    value = torch.utils.checkpoint.checkpoint(loss, problem.mixture_logits, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, problem.mixture_logits)[0], plain)


def test_cpu_results_do_not_depend_on_chunks_or_threads():
    """50,000 tokens × 400 rows take three chunks, 40 rows one; noise belongs to (row, token), wherever it is made."""
    problem = Problem((2, 400, 50_000, 4, 4))
    whole = problem.run()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, problem.run(), strict=True))
    torch.set_num_threads(before)
    problem.hidden_states, problem.upstream = problem.hidden_states[:, :40], problem.upstream[:40]
    problem.mixture_logits = problem.mixture_logits.detach()[:40].requires_grad_()
    part = problem.run()
    assert (part[0] == whole[0][:40]).all()
    assert relative_error(part[2], whole[2][:40]) <= 1e-5


@pytest.mark.interpreter
def test_triton_results_do_not_depend_on_tiles(monkeypatch):
    from repdeg_fast.triton_kernels import gumbel_mix as kernels
    from repdeg_fast.triton_kernels import tuning

    problem = Problem((2, 40, 300, 24, 24))
    with repdeg_fast.use_backend("triton"):
        results = [problem.run(hard=False)]
        for tile, buffer in ((kernels.Tile(16, 32, 16, 4, 2), 1), (kernels.Tile(64, 128, 16, 4, 2), 1 << 20)):
            monkeypatch.setattr(kernels, "_BUFFER_BYTES", buffer)
            with tuning.answering(lambda question, configurations, tile=tile: tile):
                results.append(problem.run(hard=False))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(other[1:], results[0][1:], strict=True))


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_show_in_the_embedding(place, bad, hard):
    problem = Problem((2, 6, 40, 8, 8), torch.float32, place.device)
    clean = problem.run(hard=hard)
    problem.hidden_states[0, 2, 3] = bad
    token_ids, embeddings, mixture, _ = problem.run(hard=hard)
    assert ((token_ids >= 0) & (token_ids < 40)).all()
    assert embeddings[2].isnan().all()
    assert mixture[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(embeddings[others], clean[1][others])
    assert torch.equal(mixture[others], clean[2][others])


def test_excluded_tokens_are_never_drawn(place):
    problem = Problem((2, 200, 60, 8, 8), torch.float32, place.device)
    problem.bias[:50] = -float("inf")
    token_ids, embeddings, mixture, _ = problem.run()
    assert (token_ids >= 50).all()
    assert embeddings.isfinite().all()
    assert mixture.isfinite().all()
    problem.bias[:] = -float("inf")  # nothing left to draw
    token_ids, embeddings, _, _ = problem.run()
    assert ((token_ids >= 0) & (token_ids < 60)).all()
    assert embeddings.isnan().all()


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
    hidden, mixture_logits, weight, bias, embedding = problem.tensors()
    seed = torch.tensor([SEED])
    sampling = (hidden, mixture_logits.detach(), weight, bias, seed, 0.3, "auto")
    torch.library.opcheck(gumbel_sample, sampling)
    token_ids, lse = gumbel_sample(*sampling)
    arguments = (hidden, mixture_logits, weight, bias, embedding, token_ids, lse, seed, 0.3, hard, -1.0, "auto")
    torch.library.opcheck(gumbel_value, arguments)


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


def test_double_backward_says_what_to_do():
    problem = Problem((2, 5, 30, 8, 8))
    _, embeddings = gumbel_mix(*problem.tensors())
    (grad,) = torch.autograd.grad(embeddings.square().sum(), problem.mixture_logits, create_graph=True)
    with pytest.raises(RuntimeError, match="gumbel_mix has no second derivative"):
        grad.sum().backward()


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


def test_gradient_reversal():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(gradient_reversal(x), x)
    (grad,) = torch.autograd.grad(gradient_reversal(x, -0.5).sum(), x)
    assert torch.equal(grad, torch.full_like(x, -0.5))
    with pytest.raises(TypeError, match="scale: expected a number, got str"):
        gradient_reversal(x, "1")


class TestModule:
    features, hidden = torch.randn(3, 10, 12), torch.randn(3, 10, 16)
    decoder = nn.Linear(16, 80)

    def loss(self, mixture, features):
        torch.manual_seed(0)
        _, embeddings = mixture(features, self.hidden, self.decoder.weight, self.decoder.bias, seed=SEED)
        return embeddings.square().sum()

    def test_equals_the_function(self):
        mixture = GumbelMixture(12)
        logits = torch.stack([mixture.score(f).squeeze(1) for f in self.features], dim=1)
        assert torch.allclose(mixture.mixture_logits(self.features), logits)
        token_ids, embeddings = mixture(self.features, self.hidden, self.decoder.weight, self.decoder.bias, seed=SEED)
        same_ids, same = gumbel_mix(self.hidden, logits, self.decoder.weight, self.decoder.bias, seed=SEED)
        assert torch.equal(token_ids, same_ids)
        assert torch.equal(embeddings, same)
        assert "temperature=0.3" in repr(mixture)

    def test_gradient_is_reversed_and_flows_on(self):
        features = self.features.clone().requires_grad_()
        against, along = GumbelMixture(12), GumbelMixture(12, gradient_scale=1.0)
        along.load_state_dict(against.state_dict())
        gradients = [
            torch.autograd.grad(self.loss(mixture, features), (mixture.score.weight, features))
            for mixture in (against, along)
        ]
        assert all(relative_error(a, -b) <= 1e-6 and a.any() for a, b in zip(*gradients, strict=True))

    def test_features_can_be_detached(self):
        features = self.features.clone().requires_grad_()
        mixture = GumbelMixture(12, detach_features=True)
        self.loss(mixture, features).backward()
        assert features.grad is None
        assert mixture.score.weight.grad.any()

    def test_features_of_a_wrong_shape(self):
        with pytest.raises(ValueError, match=r"features: expected shape \(K, M, 12\), got \(3, 10, 16\)"):
            GumbelMixture(12).mixture_logits(self.hidden)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.randn(4, 8)}, ValueError, r"hidden_states: expected shape \(K, M, d\)"),
        ({"hidden_states": torch.ones(2, 4, 8, dtype=torch.int64)}, TypeError, "hidden_states: expected float32"),
        ({"hidden_states": torch.randn(2, 4, 8, dtype=torch.float64)}, TypeError, "all or none in float64"),
        ({"mixture_logits": torch.randn(4, 3)}, ValueError, r"mixture_logits: expected shape \(4, 2\).*got \(4, 3\)"),
        ({"mixture_logits": torch.randn(5, 2)}, ValueError, r"mixture_logits: expected shape \(4, 2\).*got \(5, 2\)"),
        ({"mixture_logits": None}, ValueError, "mixture_logits: .*None"),
        ({"weight": torch.randn(20, 9)}, ValueError, r"weight: expected shape \(V, 8\)"),
        ({"weight": torch.randn(0, 8)}, ValueError, r"weight: expected shape \(V, 8\)"),
        ({"bias": torch.randn(19)}, ValueError, r"bias: expected shape \(20,\)"),
        ({"bias": torch.randn(20, device="meta")}, ValueError, "bias: expected device cpu"),
        ({"embedding": torch.randn(19, 8)}, ValueError, r"embedding: expected shape \(20, d_f\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"gradient_scale": float("nan")}, ValueError, "gradient_scale"),
        ({"seed": "1"}, TypeError, "seed"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed: expected device cpu"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "hidden_states": torch.randn(2, 4, 8),
        "mixture_logits": torch.randn(4, 2),
        "weight": torch.randn(20, 8),
    }
    with pytest.raises(error, match=message):
        gumbel_mix(**(arguments | change))


def test_served_by_a_kernel_here():
    assert operation.unavailable("cpu", "cpu") is None or "compil" in operation.unavailable("cpu", "cpu")
