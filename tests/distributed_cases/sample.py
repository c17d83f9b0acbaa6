"""The Gumbel sample over a vocabulary that is cut, alone and with the losses."""

import torch
from process_pool import Traffic

import repdeg_fast
from repdeg_fast import gumbel_mix, mlm_losses_and_sample
from repdeg_fast.distributed import VocabularyShard
from repdeg_fast.distributed import gumbel_mix as gumbel_over_shards

from .support import WIDTH, Cut, close, same_everywhere


def sample(rank, form, options, dtype, whole, backend):
    """The ids of one process, values and gradients."""
    heads, positions = 3, 11
    hidden = torch.randn(heads, positions, WIDTH).to(dtype)
    mixture = torch.randn(positions, heads).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(whole, WIDTH)).to(dtype).requires_grad_()
    bias = (0.3 * torch.randn(whole)).to(dtype)
    embedding = weight if options.pop("tied", False) else torch.randn(whole, 7).to(dtype).requires_grad_()
    upstream = torch.randn(positions, embedding.shape[1]).to(dtype)
    with repdeg_fast.use_backend(backend):
        ids, values = gumbel_mix(hidden, mixture, weight, bias, embedding, seed=5, **options)
        (values * upstream).sum().backward()
        cut = Cut(form, whole)
        part = cut.take(weight)
        its_embedding = part if embedding is weight else cut.take(embedding)
        mine = mixture.detach().requires_grad_()
        with Traffic() as traffic:
            got, its_values = gumbel_mix(
                hidden, mine, part, cut.take(bias), its_embedding, seed=5, shard=cut.shard, **options
            )
            (its_values * upstream).sum().backward()
    size = 8 if dtype == torch.float64 else 4
    columns = values.shape[1] * (values.element_size() if options.get("hard", True) else size)
    assert traffic.bytes() <= positions * (columns + 8 + size * (2 + 1 + 2 * heads + 3))
    assert torch.equal(got, ids)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    close(its_values, values, tolerance)
    same_everywhere(its_values)
    same_everywhere(mine.grad)
    close(mine.grad, mixture.grad, tolerance)
    close(cut.gradient(its_embedding), embedding.grad, tolerance)


def joint(rank, form, strategy, whole, heads=3):
    """The losses and the sample of one call: ids, losses, gradients."""
    positions = 8
    hidden = torch.randn(heads, positions, WIDTH).requires_grad_()
    mixture = torch.randn(positions, heads).requires_grad_()
    weight, bias = (0.3 * torch.randn(whole, WIDTH)).requires_grad_(), torch.randn(whole).requires_grad_()
    target, upstream = torch.randint(whole, (positions,)), torch.randn(positions, WIDTH)
    options = {"seed": 5, "padding_idx": 1, "first_position": 6, "strategy": strategy}
    expected = mlm_losses_and_sample(hidden, mixture, weight, target, bias, **options)
    (expected[0].sum() + (expected[2] * upstream).sum()).backward()
    cut = Cut(form, whole)
    parts, leaves = (
        [cut.take(weight), cut.take(bias)],
        [hidden.detach().requires_grad_(), mixture.detach().requires_grad_()],
    )
    sweeps, again = [], gumbel_over_shards._Sweeps.look
    gumbel_over_shards._Sweeps.look = lambda self: sweeps.append(1) or again(self)
    got = mlm_losses_and_sample(*leaves, parts[0], target, parts[1], shard=cut.shard, **options)
    gumbel_over_shards._Sweeps.look = again
    assert len(sweeps) == (strategy == "streaming")  # else the losses' logits serve
    (got[0].sum() + (got[2] * upstream).sum()).backward()
    assert torch.equal(got[1], expected[1])
    for mine, whole_one in ((got[0], expected[0]), (got[2], expected[2]), (leaves[0].grad, hidden.grad)):
        close(mine, whole_one)
    for mine, whole_one in (
        (leaves[1].grad, mixture.grad),
        (cut.gradient(parts[0]), weight.grad),
        (cut.gradient(parts[1]), bias.grad),
    ):
        close(mine, whole_one)


def seeds(rank):
    """Without a seed, ranks whose generators are elsewhere draw the same."""
    torch.manual_seed(rank)
    shard = VocabularyShard.even(20)
    ids, _ = gumbel_mix(torch.zeros(1, 50, 4), None, torch.zeros(shard.rows, 4), shard=shard)
    same_everywhere(ids)
    return ids.unique().numel()
