"""Samples whose gradient is made of the few tokens that weigh anything."""

import pytest
import torch
from helpers import relative_error

from repdeg_fast import mlm_losses_and_sample, use_backend
from repdeg_fast.contracts.gumbel_mix import Drawn, Estimator, HeadLogits, Heads, Noise, Projection, Wanted
from repdeg_fast.ops.gumbel_mix import operation
from repdeg_fast.reference import gumbel_mix as definition
from repdeg_fast.reference import philox

SEED, ROWS, FIRST_ROW = 77, 4, 3


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton")
    from repdeg_fast.triton_kernels import gumbel_candidates

    return gumbel_candidates


def case(vocabulary, dtype=torch.float16, padding=0):
    """Logits of two heads, and s of their mixture in float64."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(2, ROWS, vocabulary + padding, generator=generator).mul(2).to(dtype)[:, :, :vocabulary]
    mixture_logits, bias = torch.randn(ROWS, 2, generator=generator), torch.randn(vocabulary, generator=generator)
    bias[: vocabulary // 3] = -float("inf")
    return HeadLogits(logits, mixture_logits, bias, FIRST_ROW)


def perturbed(block):
    logits, mixture_logits, bias, first_row = block
    mixed = torch.einsum("mk,kmv->mv", mixture_logits.double().softmax(dim=1), logits.double()) + bias
    rows, columns = range(first_row, first_row + ROWS), range(mixed.shape[1])
    return mixed + philox.gumbel(torch.tensor([SEED]), rows, columns, dtype=torch.float64)


def draw(triton_kernels, block, temperature, room=512):
    drawn = Drawn(torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS))
    kept = torch.empty(ROWS, room, dtype=torch.int32)
    triton_kernels.draw(drawn, kept, block, Noise(torch.tensor([SEED]), temperature))
    return drawn, kept


def test_what_lies_beyond_reach_is_little(triton_kernels):
    """On average over noise, of whatever logits."""
    for temperature, dtype, share in ((0.3, torch.bfloat16, 2**-12), (0.15, torch.float32, 2**-24)):
        reach = triton_kernels.reach(dtype, temperature)
        for logits in (torch.zeros(5000), torch.randn(5000) * 3):
            noise = philox.gumbel(torch.tensor([1]), range(200), range(5000), dtype=torch.float64)
            s = logits + noise
            below = s.max(dim=1, keepdim=True).values - s
            y = (-below / temperature).exp()
            assert (below <= reach).sum(dim=1).double().mean() <= 32
            assert y.where(below > reach, 0).sum(dim=1).mean() <= 1.2 * share
    assert triton_kernels.reach(torch.bfloat16, 1.0) is None
    assert triton_kernels.reach(torch.float32, 0.3) is None
    assert triton_kernels.reach(torch.float32, 1e-30) == 1


@pytest.mark.interpreter
@pytest.mark.parametrize(("vocabulary", "padding"), [(2874, 6), (1024, 0), (40, 0)])
def test_tokens_within_reach_are_kept(triton_kernels, vocabulary, padding):
    block = case(vocabulary, padding=padding)
    (token_ids, peak), kept = draw(triton_kernels, block, 0.3)
    s, reach = perturbed(block), triton_kernels.reach(torch.float16, 0.3)
    most, expected = s.max(dim=1)
    assert torch.equal(token_ids, expected)
    assert relative_error(peak, (s / 0.3).softmax(dim=1).amax(dim=1)) <= 1e-3
    slack = 2**-10 * most.abs()  # for logits that have been rounded
    for row, (count, *tokens) in enumerate(kept.tolist()):
        tokens = tokens[:count]
        assert tokens == sorted(set(tokens))
        below = most[row] - s[row]
        near, far = (set((below <= x).nonzero().flatten().tolist()) for x in (reach, reach + slack[row] + 1e-5))
        assert near <= set(tokens) <= far


@pytest.mark.interpreter
@pytest.mark.parametrize(("scratch", "room"), [(1024, 512), (8, 512), (1024, 4)])
def test_rows_without_room_look_at_all_tokens(triton_kernels, monkeypatch, scratch, room):
    vocabulary, width = 300, 12
    generator = torch.Generator().manual_seed(5)
    sizes = ((2, ROWS, width), (ROWS, 2), (vocabulary, width), (vocabulary,), (vocabulary, 5), (ROWS, 5))
    hidden, mixture_logits, weight, bias, embedding, upstream = (torch.randn(s, generator=generator) for s in sizes)
    weight /= 4
    monkeypatch.setattr(triton_kernels, "_SCRATCH", scratch)
    block = HeadLogits(hidden @ weight.T, mixture_logits, bias, 0)
    drawn, kept = draw(triton_kernels, block, 0.15, room)
    assert (kept[:, 0] < 0).all() == (scratch == 8 or room == 4)
    noise, estimator, wanted = Noise(torch.tensor([SEED]), 0.15), Estimator(True, -1.0), Wanted(True, True)
    inputs = (upstream, Heads(hidden, mixture_logits), Projection(weight, bias), embedding)
    made = operation.triton().backward(*inputs, drawn, noise, estimator, wanted, kept)
    true = definition.backward(*inputs, drawn, noise, estimator, wanted)
    assert relative_error(made.mixture_logits, true.mixture_logits) <= 1e-5
    assert torch.equal(made.embedding, true.embedding)


@pytest.mark.interpreter
def test_what_is_not_a_number_shows(triton_kernels):
    block = case(1100)
    block.logits[1, 0, 1000] = float("nan")
    block.logits[0, 1, 900] = float("inf")
    block.logits[0, 2] = float("nan")
    block.logits[:, 3] = -float("inf")
    drawn, kept = draw(triton_kernels, block, 0.3)
    assert not drawn.peak.isfinite().any()
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < 1100)).all()
    inputs = (
        torch.ones(ROWS, 5),
        Heads(torch.ones(2, ROWS, 6), block.mixture_logits),
        Projection(torch.ones(1100, 6), None),
    )
    noise = Noise(torch.tensor([SEED]), 0.3)
    made = operation.triton().backward(
        *inputs, torch.ones(1100, 5), drawn, noise, Estimator(True, 1.0), Wanted(True, False), kept
    )
    assert made.mixture_logits.isnan().all()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_the_same_gradients_whichever_tokens_are_looked_at(backend):
    """In fp32 at a temperature where few tokens matter, by the joint form; strides as they come."""
    results = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(2)
        sizes = ((9, 3, 7), (3, 9), (7, 150), (4, 150))
        hidden, *others = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
        mixture_logits, weight, embedding = (tensor.t().requires_grad_() for tensor in others)
        hidden = hidden.transpose(0, 1)
        target = torch.arange(9)
        with use_backend("reference" if dtype == torch.float64 else backend):
            _, token_ids, values = mlm_losses_and_sample(
                hidden, mixture_logits, weight, target, None, embedding, temperature=0.1, seed=SEED, first_position=5,
                strategy="chunked",
            )  # fmt: skip
            gradients = torch.autograd.grad((values * torch.arange(4)).sum(), (mixture_logits, embedding))
        results.append((token_ids, *gradients))
    made, true = results
    assert torch.equal(made[0], true[0])
    assert relative_error(made[1], true[1]) <= 1e-5
    assert relative_error(made[2], true[2]) <= 1e-6
