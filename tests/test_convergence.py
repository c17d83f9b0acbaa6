"""Short trainings on real text, fused and unfused from the same seeds: the curves must not be further apart than those
of other seeds. Some minutes, so not in the usual run: ``make convergence`` runs them and prints their figures."""

import functools
import pydoc_data.topics
import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repdeg_fast
from repdeg_fast.reference.cosreg import closed_form

pytestmark = [pytest.mark.convergence, pytest.mark.usefixtures("one_thread")]

VOCABULARY, WIDTH, LENGTH, BATCH, STEPS, WINDOW = 2000, 64, 32, 16, 300, 20
SEEDS = (0, 1, 2)
UNKNOWN, MASK = 0, 1


@functools.cache
def words():
    """Python's help topics, as numbers of its most frequent words."""
    text = re.findall(r"\w+|[^\w\s]", "\n".join(pydoc_data.topics.topics.values()).lower())
    number = {word: i + 2 for i, (word, _) in enumerate(Counter(text).most_common(VOCABULARY - 2))}
    return torch.tensor([number.get(word, UNKNOWN) for word in text])


class Block(nn.Module):
    """A post-LN layer whose residual sums are ADMIN's."""

    def __init__(self, fused, causal):
        super().__init__()
        self.fused, self.causal = fused, causal
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(repdeg_fast.AdminNorm(WIDTH, omega=1.5) for _ in range(2))

    def norm(self, i, x, branch):
        norm = self.norms[i]
        if self.fused:
            return norm(x, branch)
        return F.layer_norm(x * norm.omega + branch, (WIDTH,), norm.weight, norm.bias, norm.eps)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = self.norm(0, x, self.out(attended))
        return self.norm(1, x, self.down(F.gelu(self.up(x))))


class Model(nn.Module):
    def __init__(self, fused, causal):
        super().__init__()
        self.fused = fused
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Block(fused, causal) for _ in range(2)))
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, tokens):
        return self.layers(self.embedding(tokens) + self.position.weight[: tokens.shape[1]])

    def head_loss(self, hidden, target):
        weight = self.embedding.weight
        if self.fused:
            return repdeg_fast.linear_cross_entropy(hidden, weight, target, self.bias)
        return F.cross_entropy(F.linear(hidden, weight, self.bias).flatten(0, -2).float(), target.flatten())


def masked(model, tokens, generator):
    """With CosReg of the embedding, as in arXiv 1907.12009."""
    where = torch.rand(tokens.shape, generator=generator) < 0.2
    loss = model.head_loss(model(tokens.masked_fill(where, MASK)), tokens.masked_fill(~where, -100))
    weight = model.embedding.weight
    return loss + (repdeg_fast.cosine_regularization(weight) if model.fused else closed_form(weight))


def causal(model, tokens, _):
    return model.head_loss(model(tokens[:, :-1]), tokens[:, 1:])


def contrastive(model, tokens, _):
    """The halves of a span shall find each other. Less what all have in common: an untrained model's vectors are nearly
    parallel, and the digits of bfloat16 would be spent on that."""
    queries, documents = (model(half).mean(1).float() for half in tokens.chunk(2, dim=1))
    common = torch.cat([queries, documents]).mean(0)
    queries, documents = queries - common, documents - common
    if model.fused:
        return repdeg_fast.contrastive_loss(queries, documents, scale=10.0)
    scores = 10.0 * F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
    return F.cross_entropy(scores.float(), torch.arange(len(scores)))


def curve(task, dtype, fused, seed):
    """The mean loss of each window of steps."""
    torch.manual_seed(seed)
    model, generator = Model(fused, causal=task is causal), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        start = torch.randint(len(words()) - LENGTH, (BATCH, 1), generator=generator)
        tokens = words()[start + torch.arange(LENGTH)]
        with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
            loss = task(model, tokens, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).view(-1, WINDOW).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("task", [masked, causal, contrastive], ids=lambda task: task.__name__)
def test_curves_stay_together(task, dtype, capsys):
    unfused, fused = (torch.stack([curve(task, dtype, one, seed) for seed in SEEDS]) for one in (False, True))
    noise = unfused.std(dim=0)  # of a window, over seeds
    apart = (fused - unfused).abs().mean(dim=0)  # of one seed
    first, last, ours = unfused[:, 0].mean(), unfused[:, -1].mean(), fused[:, -1].mean()
    figures = (
        f"{task.__name__} {str(dtype)[6:]}: loss {first:.3f} → {last:.3f} unfused, {ours:.3f} fused",
        f"curves of one seed are {apart.mean():.2g} apart on average, {apart.max():.2g} at most",
        f"the seeds' standard deviation is {noise.mean():.2g} on average, {noise.min():.2g} to {noise.max():.2g}",
    )
    with capsys.disabled():
        print("\n" + "; ".join(figures))
    assert ours < 0.85 * first  # it learned something
    assert apart.mean() <= noise.mean()
    assert (apart <= 2 * noise.mean()).all()
    assert (fused.mean(0) - unfused.mean(0)).abs().mean() <= noise.mean() / len(SEEDS) ** 0.5
