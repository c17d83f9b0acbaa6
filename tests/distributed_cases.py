"""What ranks do in tests/test_distributed.py: the same problem cut over them, beside the one of one process."""

import copy
import os
import time
from datetime import timedelta

import torch
from process_pool import Traffic
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import repdeg_fast
from repdeg_fast import (
    MultiLayerMLMHead,
    add_cosine_regularization_,
    contrastive_loss,
    cosine_regularization,
    gumbel_mix,
    linear_cross_entropy,
    mlm_losses_and_sample,
    multi_layer_mlm_loss,
)
from repdeg_fast.analysis import Covariances, HiddenStates, LayerChange, pwcca
from repdeg_fast.distributed import VocabularyParallel, VocabularyShard, compare_arguments
from repdeg_fast.distributed import gumbel_mix as gumbel_over_shards
from repdeg_fast.distributed import linear_cross_entropy as over_shards

WIDTH = 12


def mesh(shape=None, names=("tp",)):
    return init_device_mesh("cpu", shape or (distributed.get_world_size(),), mesh_dim_names=names)


def uneven(whole, ranks):
    """Ends of ranges: the first rank has one row, the last but one none, if there are enough."""
    ends = [0, *(min(whole, 1 + 3 * i) for i in range(ranks - 1)), whole]
    if ranks > 2:
        ends[-2] = ends[-3]
    return ends


class Cut:
    """A matrix (V, d), or vector (V,), as each rank of a vocabulary-parallel call has it, and its gradient whole."""

    def __init__(self, form, whole):
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
        self.form, self.whole, self.shard = form, whole, None
        if form == "dtensor":
            self.mesh = mesh()
        else:
            ends = uneven(whole, ranks)
            self.shard = VocabularyShard(ends[rank], ends[rank + 1], whole)

    def take(self, tensor):
        if tensor is None:
            return None
        if self.form == "dtensor":
            part = distribute_tensor(tensor.detach(), self.mesh, [Shard(0)])
        else:
            part = tensor.detach()[self.shard.first : self.shard.last].clone()
        return part.requires_grad_(tensor.requires_grad)

    def gradient(self, part):
        if self.form == "dtensor":
            return part.grad.full_tensor()
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, part.grad)
        return torch.cat(parts)


def close(got, expected, tolerance=1e-5):
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape
    error, size = (got - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * (size or 1), f"off by {error / (size or 1):.2g}"


def same_everywhere(tensor):
    parts = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, tensor.detach())
    for part in parts:
        assert torch.equal(part, parts[0])


def cosreg(rank, form, weighted, dtype, whole, backend):
    weight = torch.randn(whole, WIDTH, dtype=dtype) + 1
    weight[min(2, whole - 1)] = 0
    weight[0] *= 1e-14
    weight.requires_grad_()
    row_weight = torch.rand(whole) * 1e30 if weighted else None
    with repdeg_fast.use_backend(backend):
        expected = cosine_regularization(weight, row_weight=row_weight)
        expected.backward()
        cut = Cut(form, whole)
        part, its_weight = cut.take(weight), cut.take(row_weight)
        with Traffic() as traffic:
            value = cosine_regularization(part, row_weight=its_weight, shard=cut.shard)
            value.backward()
        assert traffic.bytes() <= 8 * (WIDTH + 2)
        added = part.detach().requires_grad_()
        added.grad = torch.ones_like(added)
        again = add_cosine_regularization_(added, 2.0, row_weight=its_weight, shard=cut.shard)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close(value, expected, tolerance)
    close(again, expected, tolerance)
    same_everywhere(value)
    close(cut.gradient(part), weight.grad, tolerance)
    close(cut.gradient(added), 1 + 2 * weight.grad, tolerance)


def cosreg_of_two_dimensions(rank):
    """FSDP2 over both dimensions of a mesh, over one with copies on the other."""
    weight = torch.randn(7, WIDTH)
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        part = nn.Parameter(distribute_tensor(weight, mesh((2, 2), ("dp", "tp")), placements))
        part.grad = torch.zeros_like(part)
        close(add_cosine_regularization_(part, 1.0), cosine_regularization(weight))
        whole = weight.clone().requires_grad_()
        cosine_regularization(whole).backward()
        close(part.grad.full_tensor(), whole.grad)


def cross_entropy(rank, form, heads, options, dtype, whole, backend):
    """Values and gradients of hidden states, weight and bias."""
    positions, bias = 9, options.pop("bias", True)
    hidden = (3 * torch.randn(heads, positions, WIDTH)).to(dtype).requires_grad_()
    weight = torch.randn(whole, WIDTH).to(dtype).requires_grad_()
    bias = torch.randn(whole).to(dtype).requires_grad_() if bias else None
    target = torch.randint(whole, (positions,))
    target[3] = -100
    upstream = torch.rand(heads, positions if options.get("reduction") == "none" else 1)
    return_lse = options.pop("return_lse", False)
    over_shards.SMALLEST = options.pop("smallest", 1 << 20)  # of a piece of rows

    def run(hidden, weight, bias, **more):
        if return_lse:
            loss, lse = linear_cross_entropy(hidden[0], weight, target, bias, return_lse=True, **options, **more)
            return loss + lse.square().mean()
        losses = multi_layer_mlm_loss(hidden, weight, target, bias, **options, **more)
        return (
            (losses * upstream.squeeze()).sum()
            if options.get("reduction") == "none"
            else (losses * upstream[:, 0]).sum()
        )

    with repdeg_fast.use_backend(backend):
        expected = run(hidden, weight, bias)
        expected.backward()
        cut = Cut(form, whole)
        parts = [cut.take(weight), cut.take(bias)]
        mine = hidden.detach().requires_grad_()
        with Traffic() as forward:
            value = run(mine, *parts, shard=cut.shard)
        with Traffic() as backward:
            value.backward()
    assert forward.bytes() <= 12 * heads * positions * (2 if dtype == torch.float64 else 1)
    assert backward.bytes() == hidden.nbytes
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    close(value, expected, tolerance)
    same_everywhere(value)
    same_everywhere(mine.grad)
    close(mine.grad, hidden.grad, tolerance)
    close(cut.gradient(parts[0]), weight.grad, tolerance)
    if bias is not None:
        close(cut.gradient(parts[1]), bias.grad, tolerance)


def cross_entropy_options(rank, form, heads, options, dtype, whole, backend):
    """What is served beside: every number of one process, classes with equal logits included."""
    positions, options = 10, dict(options)
    hidden = torch.randint(-2, 3, (heads, positions, WIDTH)).to(dtype).requires_grad_()
    rows = torch.randint(-4, 5, (whole, WIDTH)) / 8  # small integers are multiplied and added up without rounding
    rows[whole // 2 :] = rows[: whole - whole // 2].clone()  # each logit twice, on other ranks
    weight, bias = rows.to(dtype).requires_grad_(), torch.zeros(whole).to(dtype).requires_grad_()
    target = torch.randint(whole, (positions,))
    target[3] = -100
    with torch.no_grad():
        best = (hidden[0] @ weight.T).float().argmax(dim=1)
    target[5:] = best[5:]
    each = torch.rand(whole) + 0.1 if options.pop("weighted", False) else None
    told = {"return_predictions": True, "return_accuracy": True, "return_z_loss": True}
    if options.pop("plain", False):
        told = {}

    def run(hidden, weight, bias, **more):
        if heads == 1:
            asked = {"return_lse": True, **told, **options, "class_weight": each, **more}
            found = linear_cross_entropy(hidden.view(2, -1, WIDTH), weight, target.view(2, -1), bias, **asked)
            return (found, found[0].sum() + found[1].tanh().sum())
        found = multi_layer_mlm_loss(hidden, weight, target, bias, class_weight=each, **told, **options, **more)
        loss = found.loss if told else found
        return found, (loss.float() * torch.arange(1.0, heads + 1).view(-1, *[1] * (loss.dim() - 1))).sum()

    with repdeg_fast.use_backend(backend):
        expected, total = run(hidden, weight, bias, strategy="streaming")
        total.backward()
        cut = Cut(form, whole)
        parts = [cut.take(weight), cut.take(bias)]
        mine = hidden.detach().requires_grad_()
        with Traffic() as traffic:
            found, value = run(mine, *parts, shard=cut.shard)
        value.backward()
    size = 8 if dtype == torch.float64 else 4
    assert traffic.bytes() <= heads * positions * (3 * size + (size + 8 if told else 0))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    for name in found._fields if told else ():
        got, right = getattr(found, name), getattr(expected, name)
        assert (got is None) == (right is None)
        if name in ("predictions", "accuracy"):
            assert torch.equal(got, right), name
        elif got is not None:
            close(got, right, tolerance)
    close(value, total, tolerance)
    same_everywhere(mine.grad)
    close(mine.grad, hidden.grad, tolerance)
    close(cut.gradient(parts[0]), weight.grad, tolerance)
    close(cut.gradient(parts[1]), bias.grad, tolerance)


def raised(function):
    """Type and text of what a call raises, for the test to look at on every rank."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def bad_ranges(rank, ranges, whole):
    first, last = ranges[rank]
    return raised(lambda: VocabularyShard(first, last, whole[rank] if isinstance(whole, list) else whole))


def bad_input(rank):
    """Each a mistake that every rank makes; what it raises."""
    weight, hidden, target = torch.randn(8, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    shard = VocabularyShard.even(8)
    mine, placed = weight[shard.first : shard.last], distribute_tensor(weight, mesh(), [Shard(0)])
    columns = distribute_tensor(weight, mesh(), [Shard(1)])
    cross_entropy = lambda w, b=None, t=target, h=hidden, **o: lambda: linear_cross_entropy(h, w, t, b, **o)  # noqa: E731
    calls = {
        "columns": cross_entropy(columns),
        "columns of cosreg": lambda: cosine_regularization(columns),
        "no such dimension": lambda: VocabularyShard.of_mesh(mesh(), "pp", 8),
        "other group": lambda: VocabularyShard(
            0, 8, 8, distributed.new_group([1 - rank]) and distributed.GroupMember.NON_GROUP_MEMBER
        ),
        "other rows": cross_entropy(weight[:3], shard=shard),
        "no shard": cross_entropy(mine, shard=(0, 4)),
        "shard and dtensor": cross_entropy(placed, shard=shard),
        "plain bias": cross_entropy(placed, torch.zeros(8)),
        "replicated bias": cross_entropy(placed, distribute_tensor(torch.zeros(8), mesh(), [Replicate()])),
        "hidden states cut": cross_entropy(placed, h=distribute_tensor(hidden, mesh(), [Shard(0)])),
        "target": cross_entropy(mine, t=target + 6, shard=shard),
        "chunked": cross_entropy(mine, shard=shard, strategy="chunked"),
        "class weights of the rows here": cross_entropy(mine, shard=shard, class_weight=torch.ones(4)),
        "class weights cut": cross_entropy(placed, class_weight=distribute_tensor(torch.ones(8), mesh(), [Shard(0)])),
        "shift": cross_entropy(mine, shard=shard, shift=-1),
        "padding": cross_entropy(mine, shard=shard, padding_idx=8),
        "row weights": lambda: cosine_regularization(mine, row_weight=torch.arange(4.0) - rank, shard=shard),
    }
    return {name: raised(call) for name, call in calls.items()}


def disagree(rank):
    """With the debug mode on: what differs is named on every rank."""
    weight, hidden, target = torch.randn(8, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    shard = VocabularyShard.even(8)
    mine = weight[shard.first : shard.last]
    with compare_arguments():
        linear_cross_entropy(hidden, mine, target, shard=shard)
        return {
            "hidden_states": raised(lambda: linear_cross_entropy(hidden + rank, mine, target, shard=shard)),
            "label_smoothing": raised(
                lambda: linear_cross_entropy(hidden, mine, target, label_smoothing=0.1 * rank, shard=shard)
            ),
            "operation": raised(
                lambda: (
                    linear_cross_entropy(hidden, mine, target, shard=shard)
                    if rank
                    else multi_layer_mlm_loss([hidden], mine, target, shard=shard)
                )
            ),
            "eps": raised(lambda: cosine_regularization(mine, eps=1e-12 * (1 + rank), shard=shard)),
        }


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


def seeds(rank):
    """Without a seed, ranks whose generators are elsewhere draw the same."""
    torch.manual_seed(rank)
    shard = VocabularyShard.even(20)
    ids, _ = gumbel_mix(torch.zeros(1, 50, 4), None, torch.zeros(shard.rows, 4), shard=shard)
    same_everywhere(ids)
    return ids.unique().numel()


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


def bad_contrastive(rank):
    queries, documents, group = torch.randn(2, 4), torch.randn(2 + rank, 4), distributed.group.WORLD
    good = torch.randn(2, 4)
    return {
        "documents": raised(lambda: contrastive_loss(queries, documents, group=group)),
        "positive": raised(lambda: contrastive_loss(queries, good, positive=torch.arange(2), group=group)),
        "exchange": raised(lambda: contrastive_loss(queries, good, exchange="star", group=group)),
        "query_ids": raised(
            lambda: contrastive_loss(queries, good, query_ids=torch.arange(2), exchange="ring", group=group)
        ),
    }


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


def late(rank, seconds):
    """Another rank comes after the timeout."""
    group = distributed.new_group(timeout=timedelta(seconds=seconds))
    shard = VocabularyShard.even(8, group)
    if rank:
        time.sleep(2 * seconds)
        return None
    return raised(lambda: cosine_regularization(torch.randn(shard.rows, 4), shard=shard))


def die(rank, step):
    """Rank 1 is gone in the middle of a training."""
    shard, weight = VocabularyShard.even(8), torch.randn(4, WIDTH).requires_grad_()
    for now in range(20):
        if rank and now == step:
            os._exit(1)
        linear_cross_entropy(torch.ones(3, WIDTH), weight, torch.arange(3), shard=shard).backward()
