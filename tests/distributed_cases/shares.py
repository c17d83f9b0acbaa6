"""What ranks share beside vocabularies: batches, and points."""

import torch
from torch import distributed

from repdeg_fast import contrastive_loss
from repdeg_fast.analysis import Covariances, HiddenStates, LayerChange, pwcca

from .support import WIDTH, close, raised, same_everywhere


def contrastive(rank, options, dtype):
    """Parts of any size; averaged gradients are those of the whole batch."""
    ranks, each = distributed.get_world_size(), [3, 1, 4, 2][: distributed.get_world_size()]
    first, n, whole, negatives = sum(each[:rank]), each[rank], sum(each), 2
    queries = torch.randn(whole, WIDTH).to(dtype).requires_grad_()
    documents = torch.randn(1 + negatives, whole, WIDTH).to(dtype).requires_grad_()
    ids = {"query_ids": torch.arange(whole) // 2, "document_ids": torch.arange(3 * whole) // 2}
    ids = ids if options.pop("ids", False) else {}
    exchange = options.pop("exchange", "gather")
    expected = contrastive_loss(queries, documents.flatten(0, 1), **options, **ids)
    expected.sum().backward()
    part = slice(first, first + n)
    mine = [queries.detach()[part].requires_grad_(), documents.detach()[:, part].clone().requires_grad_()]
    its_ids = {name: value.view(-1, whole)[:, part].flatten() for name, value in ids.items()}
    got = contrastive_loss(
        mine[0], mine[1].flatten(0, 1), group=distributed.group.WORLD, exchange=exchange, **options, **its_ids
    )
    got.sum().backward()
    none = options.get("reduction") == "none"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close(got, expected[part] if none else expected, tolerance)
    if not none:
        same_everywhere(got)
    scale = 1 if none else ranks
    close(mine[0].grad / scale, queries.grad[part], tolerance)
    close(mine[1].grad / scale, documents.grad[:, part], tolerance)


def moments(rank, empty):
    """Covariances and changes of layers, of points that ranks share; a rank may have none."""
    points, others = torch.randn(40, 3) + 5, torch.randn(40, 4)
    whole = Covariances(("a", "b")).update(points, others)
    ends = [0, 0, 40] if empty else [0, 13, 40]
    part = slice(ends[rank], ends[rank + 1])
    mine = Covariances(("a", "b")).update(points[part], others[part]).merge_ranks()
    assert mine.points == 40
    assert mine.name(1) == "b"
    close(mine.mean(), whole.mean(), 1e-12)
    close(mine.scatter(0, 1), whole.scatter(0, 1), 1e-10)
    assert abs(pwcca(mine).distance - pwcca(whole).distance) < 1e-8
    names, rows = ("embeddings", "layer 1"), torch.arange(40)
    states = HiddenStates(names, (points, points.square()), rows % 4, rows, rows)
    bins = torch.tensor([0, 1, 1, -1])
    change = LayerChange(bins).update(states.select(torch.isin(rows, rows[part]))).merge_ranks()
    expected = LayerChange(bins).update(states)
    for kind in (0, 1):
        assert abs(change.by_bin()[kind][0].distance - expected.by_bin()[kind][0].distance) < 1e-8
    return raised(lambda: Covariances().update(torch.randn(5, 2 + rank)).merge_ranks())
