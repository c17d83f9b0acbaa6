"""Inputs and models whose tensors are DTensors."""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from repdeg_fast import MultiLayerMLMHead, gumbel_mix, linear_cross_entropy, mlm_losses_and_sample, multi_layer_mlm_loss
from repdeg_fast.distributed import VocabularyParallel

from .support import WIDTH, Cut, close, mesh, raised


def dtensors(rank):
    """Hidden states that are DTensors make DTensors, with the numbers of plain ones."""
    weight, target = torch.randn(9, WIDTH), torch.arange(4)
    part, hidden = distribute_tensor(weight, mesh(), [Shard(0)]), torch.randn(2, 4, WIDTH)
    told = {"return_z_loss": True, "return_predictions": True, "return_accuracy": True, "lse_square_scale": 0.1}
    calls = [
        lambda h: linear_cross_entropy(h[0], part, target),
        lambda h: linear_cross_entropy(h, part, target.expand(2, 4), return_lse=True, shift=1),
        lambda h: linear_cross_entropy(h[1], part, target, **told),
        lambda h: multi_layer_mlm_loss(h, part, target, **told),
        lambda h: multi_layer_mlm_loss([h[0], h[1]], part, target),
        lambda h: gumbel_mix(h[:1], None, part, seed=1),
        lambda h: mlm_losses_and_sample(h[:1], None, part, target, seed=1),
    ]
    for call in calls:
        plain = hidden.clone().requires_grad_()
        placed = distribute_tensor(hidden, mesh(), [Replicate()]).requires_grad_()
        both = [found if isinstance(found, tuple) else (found,) for found in (call(plain), call(placed))]
        for mine, right in zip(both[1], both[0], strict=True):
            assert isinstance(mine, DTensor) == (right is not None)
            assert right is None or (torch.equal(mine.to_local(), right) and not isinstance(right, DTensor))
        if both[0][0].requires_grad:
            both[0][0].sum().backward(), both[1][0].sum().backward()
            assert isinstance(placed.grad, DTensor)
            close(placed.grad.full_tensor(), plain.grad)


def nothing_to_do(rank):
    """No row, or none that counts."""
    weight = torch.randn(6, WIDTH).requires_grad_()
    cut = Cut("dtensor", 6)
    for rows, target in ((0, torch.zeros(0, dtype=torch.long)), (3, torch.full((3,), -100))):
        hidden, part = torch.randn(2, rows, WIDTH).requires_grad_(), cut.take(weight)
        options = {"label_smoothing": 0.1, "softcap": 2.0, "lse_square_scale": 0.1, "return_accuracy": True}
        found = multi_layer_mlm_loss(hidden, part, target, class_weight=torch.rand(6), **options)
        losses, ids, values = mlm_losses_and_sample(hidden, torch.zeros(rows, 2), part, target, seed=1)
        (found.loss.sum() + losses.sum()).backward()
        assert found.loss.tolist() == found.accuracy.tolist() == losses.tolist() == [0, 0]
        assert ids.shape == values.shape[:1] == (rows,)
        assert not part.grad.full_tensor().any()
        assert not hidden.grad.any()


def style(rank):
    """Lookups and logits of a cut vocabulary, more ranks than rows; copies; what cannot be cut."""
    words = nn.Embedding(3, WIDTH, padding_idx=1)
    model = nn.ModuleDict({"words": words, "head": MultiLayerMLMHead(WIDTH, words)})
    nn.init.normal_(model["head"].bias)
    plain = copy.deepcopy(model)
    assert parallelize_module(model, mesh(), VocabularyParallel()) is model
    assert isinstance(model["words"], nn.Embedding)
    assert model["head"].weight is model["words"].weight
    ids = torch.tensor([[0, 1], [2, 0]])
    for one in (plain, copy.deepcopy(model), model):
        hidden = one["words"](ids)
        ((one["head"].logits(hidden) * torch.arange(3.0)).sum() + hidden.square().sum()).backward()
    close(model["words"](ids), plain["words"](ids))
    close(model["head"].logits(hidden), plain["head"].logits(hidden))
    for mine, right in zip(model.parameters(), plain.parameters(), strict=True):
        close(mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad, right.grad)
    limited = nn.Embedding(4, WIDTH, max_norm=1.0)
    wrong = {
        "got Linear without": nn.Linear(2, 2),
        "embedding without max_norm": nn.ModuleList([limited, MultiLayerMLMHead(WIDTH, limited)]),
        "tied to an nn.Embedding": MultiLayerMLMHead(WIDTH, nn.Parameter(torch.zeros(4, WIDTH))),
    }
    return {text: raised(lambda m=m: parallelize_module(m, mesh(), VocabularyParallel())) for text, m in wrong.items()}
