"""Which tokens Gumbel mixing draws, and what that does not depend on."""

import math

import pytest
import torch
from gumbel_mix_cases import SEED, Problem
from helpers import relative_error

import repdeg_fast
from repdeg_fast import gumbel_mix
from repdeg_fast._mixture import mix
from repdeg_fast.ops.gumbel_mix import operation  # noqa: F401
from repdeg_fast.reference import philox


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
    mixed = mix(problem.hidden_states.double(), problem.mixture_logits.detach().double())
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


def test_cpu_results_do_not_depend_on_chunks_or_threads(threads):
    """50,000 tokens × 400 rows take three chunks, 40 rows one; noise belongs to (row, token), wherever it is made."""
    problem = Problem((2, 400, 50_000, 4, 4))
    threads(2)
    whole = problem.run()
    threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, problem.run(), strict=True))
    problem.hidden_states, problem.upstream = problem.hidden_states[:, :40], problem.upstream[:40]
    problem.mixture_logits = problem.mixture_logits.detach()[:40].requires_grad_()
    part = problem.run()
    assert (part[0] == whole[0][:40]).all()
    assert relative_error(part[2], whole[2][:40]) <= 1e-5


@pytest.mark.interpreter
def test_triton_results_do_not_depend_on_chunks(monkeypatch):
    """Nor on how many columns of one are worked on at a time."""
    from repdeg_fast.triton_kernels import tuning
    from repdeg_fast.triton_kernels.gumbel_mix import Block

    from repdeg_fast.ops import chunked_vocabulary

    problem = Problem((2, 10, 300, 24, 24))
    with repdeg_fast.use_backend("triton"):
        results = [problem.run(hard=False)]
        monkeypatch.setattr(chunked_vocabulary, "BUFFER_BYTES", 1)  # 128 columns
        for columns in (64, 512):
            with tuning.answering(lambda question, configurations, columns=columns: Block(columns, 4)):
                results.append(problem.run(hard=False))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(other[1:], results[0][1:], strict=True))
