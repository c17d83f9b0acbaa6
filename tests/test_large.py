"""Operations over a vocabulary whose weight has more than 2³¹ elements, and in CUDA graphs: on a GPU. A small weight on
the CPU tests the tests."""

import pytest
import torch
from helpers import relative_error
from torch.nn import functional as F

from repdeg_fast import gumbel_mix, linear_cross_entropy, mlm_losses_and_sample, multi_layer_mlm_loss, use_backend
from repdeg_fast.reference import philox

PLACES = [  # device, vocabulary, width
    pytest.param("cpu", 3001, 96, id="small"),
    pytest.param("cuda", 2**20 + 5, 2048, id="gpu", marks=[pytest.mark.gpu, pytest.mark.large]),
]
ROWS = 40
STRATEGIES = ("chunked", "streaming")
SEED = 5


def leaves(heads, rows, vocabulary, width, device="cuda"):
    """Hidden states, mixture logits, weight and bias, in bf16."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = {(heads, rows, width): 1, (rows, heads): 1, (vocabulary, width): width**-0.5, (vocabulary,): 1}
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return [torch.randn(*size, **options).mul_(scale).requires_grad_() for size, scale in sizes.items()]


def step(tensors, target, seed, strategy):
    """Losses, tokens and all gradients."""
    hidden_states, mixture_logits, weight, bias = tensors
    losses, token_ids, embeddings = mlm_losses_and_sample(
        hidden_states, mixture_logits, weight, target, bias, seed=seed, strategy=strategy
    )
    return losses, token_ids, *torch.autograd.grad(losses.sum() + embeddings.float().square().sum(), tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cuda_graph_replays_with_other_inputs_and_another_seed(strategy):
    tensors = leaves(3, 70, 1000, 64)
    target, seed = torch.randint(1000, (70,), device="cuda"), torch.tensor([SEED], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(tensors, target, seed, strategy)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(tensors, target, seed, strategy)
    seed.fill_(SEED + 1)
    target.copy_(target.flip(0))
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    for one, other in zip(replayed, step(tensors, target, seed, strategy), strict=True):
        assert torch.equal(one, other)


def problem(device, vocabulary, width):
    """Hidden states, a weight, and targets among its last 64 rows."""
    hidden_states, _, weight, _ = leaves(1, ROWS, vocabulary, width, device)
    return hidden_states, weight, vocabulary - 1 - torch.arange(ROWS, device=device)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("device", "vocabulary", "width"), PLACES)
def test_losses_beyond_two_to_the_31_elements(device, vocabulary, width, strategy):
    hidden_states, weight, target = problem(device, vocabulary, width)
    loss = multi_layer_mlm_loss(hidden_states, weight, target, strategy=strategy).sum()
    loss.backward()
    with torch.no_grad():
        hidden = hidden_states[0].float()
        lse = torch.stack([(hidden @ part.float().T).logsumexp(1) for part in weight.split(4096)]).logsumexp(0)
        logits = hidden @ weight[-64:].float().T
        last = target - (vocabulary - 64)
        true_loss = (lse - logits.gather(1, last[:, None]).squeeze(1)).mean()
        gradient = (logits - lse[:, None]).exp().scatter_add_(1, last[:, None], -torch.ones(ROWS, 1, device=device))
    assert relative_error(loss, true_loss) <= 1e-2
    assert relative_error(weight.grad[-64:], gradient.T @ hidden / ROWS) <= 1e-2


@pytest.mark.parametrize(("device", "vocabulary", "width"), PLACES)
def test_samples_beyond_two_to_the_31_elements(device, vocabulary, width):
    hidden_states, weight, _ = problem(device, vocabulary, width)
    bias = torch.full((vocabulary,), -torch.inf, device=device)
    bias[-64:] = 0  # only the last tokens can be drawn
    token_ids, embeddings = gumbel_mix(hidden_states, None, weight, bias, seed=SEED)
    logits = hidden_states[0].float() @ weight[-64:].float().T
    noise = philox.gumbel(torch.tensor([SEED], device=device), range(ROWS), range(vocabulary - 64, vocabulary))
    best = (logits + noise).topk(2, dim=1)
    clear = best.values[:, 0] - best.values[:, 1] > 0.01  # others may be ties within rounding
    assert torch.equal(token_ids[clear], best.indices[clear, 0] + vocabulary - 64)
    assert torch.equal(embeddings, weight[token_ids])


@pytest.mark.interpreter
def test_steps_of_two_to_the_30_elements_in_the_interpreter():
    """Of a transposed weight, in memory that is never touched: a product of 32 bits would reach 2³¹ elements back."""
    step, vocabulary, width = 2**30, 5, 3
    memory = torch.empty(2 * width * step, dtype=torch.float16)
    weight = memory.as_strided((vocabulary, width), (1, step), storage_offset=width * step - step)
    hidden_states, target = torch.randn(4, width, dtype=torch.float16), torch.arange(4)
    weight.copy_(torch.randn(vocabulary, width))
    with use_backend("triton"):
        loss = linear_cross_entropy(hidden_states, weight, target, strategy="streaming")
    true_loss = F.cross_entropy(hidden_states.float() @ weight.float().T, target)
    assert relative_error(loss, true_loss) <= 1e-2
