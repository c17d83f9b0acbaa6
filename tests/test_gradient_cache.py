"""Gradient caching: equal to one step with all activations, and free of the faults of published code."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repdeg_fast import contrastive_loss, span_pair_loss
from repdeg_fast.training import Encoded, cached_backward, gradient_cache, split_batch

N, WIDTH, WORDS = 12, 6, 20
pytestmark = pytest.mark.usefixtures("one_thread")


class Encoder(nn.Module):
    """Tokens (n, 3) to embeddings, with dropout; with a head also to the loss of the tokens that are not 0."""

    def __init__(self, head=False):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS) if head else None
        self.draws = []

    def forward(self, tokens):
        hidden = self.linear(self._dropout(self.embedding(tokens)))
        if self.head is None:
            return hidden.mean(1)
        scores = self.head(self._dropout(hidden))
        target = tokens.masked_fill(tokens == 0, -100)
        count = (target != -100).sum()
        loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum") / count.clamp_min(1)
        return Encoded(hidden[:, 0], loss, count)

    def _dropout(self, x):
        kept = torch.rand(x.shape)
        self.draws.append(kept)
        return x * (kept > 0.3)


def tokens(n=N):
    return torch.randint(1, WORDS, (n, 3))


def chunked_step(model, loss_fn, *batches, size, weight=1.0):
    """The same chunks with a graph that is kept: what caching must equal."""
    torch.manual_seed(5)
    encoded = [[model(part) for part in split_batch(batch, size)] for batch in batches]
    encoded = [[e if isinstance(e, Encoded) else Encoded(e) for e in column] for column in encoded]
    loss = loss_fn(*(torch.cat([e.embeddings for e in column]) for column in encoded))
    own = [(e.loss * e.count, e.count) for column in encoded for e in column if e.loss is not None]
    if own:
        loss = loss + weight * sum(value for value, _ in own) / sum(count for _, count in own)
    loss.backward()
    return loss


def cached_step(model, *arguments, **options):
    torch.manual_seed(5)
    return cached_backward(model, *arguments, **options)


def assert_same_gradients(model, other, tolerance=1e-6):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance * 10, atol=tolerance, msg=name)


@pytest.mark.parametrize("size", [1, 4, 5, 12, 50])
def test_equals_the_uncached_step(size):
    """With dropout, for sizes that divide and do not, down to chunks of one."""
    model = Encoder()
    plain = copy.deepcopy(model)
    batches = tokens(), tokens()
    losses = cached_step(model, contrastive_loss, *batches, chunk_size=size)
    loss = chunked_step(plain, contrastive_loss, *batches, size=size)
    torch.testing.assert_close(losses.loss, loss.detach())
    assert losses.chunk_loss is None
    assert not losses.loss.requires_grad
    assert_same_gradients(model, plain)


def test_equals_the_step_without_chunks():
    model = Encoder().eval()
    model._dropout = lambda x: x
    plain = copy.deepcopy(model)
    batch = tokens()
    cached_backward(model, span_pair_loss, batch, chunk_size=5)
    span_pair_loss(plain(batch)).backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_losses_of_chunks_are_counted_once_each_thing_the_same(size):
    """Published code counts the masked-language-model loss twice, and takes means of chunks' means."""
    model = Encoder(head=True)
    plain = copy.deepcopy(model)
    batch = tokens()
    batch[:7, 1:] = 0  # chunks with few masked tokens, and others with many
    losses = cached_step(model, span_pair_loss, batch, chunk_size=size, chunk_loss_weight=0.5)
    loss = chunked_step(plain, span_pair_loss, batch, size=size, weight=0.5)
    torch.testing.assert_close(losses.loss, loss.detach())
    torch.testing.assert_close(losses.loss, losses.embedding_loss + 0.5 * losses.chunk_loss)
    assert_same_gradients(model, plain)


def test_nothing_to_count():
    model = Encoder(head=True)
    losses = cached_backward(model, span_pair_loss, torch.zeros(4, 3, dtype=torch.long), chunk_size=2)
    assert losses.chunk_loss == 0
    assert model.head.weight.grad is None or model.head.weight.grad.abs().max() == 0


def test_random_states_do_not_overlap():
    """Each chunk draws the same numbers in both passes, and none that another chunk, or its head, draws."""
    model = Encoder(head=True)
    cached_backward(model, span_pair_loss, tokens(), chunk_size=4)
    first, second = model.draws[:6], model.draws[6:]
    assert len(second) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    values = torch.cat([draw.flatten() for draw in first])
    assert len(values.unique()) > 0.99 * len(values)


def test_an_encoder_must_do_the_same_twice():
    """One that skips its head without gradients would draw the next chunk's numbers in it."""
    model = Encoder(head=True)

    def encode(batch):
        encoded = model(batch)
        return encoded if torch.is_grad_enabled() else encoded.embeddings

    with pytest.raises(ValueError, match="encode: expected to return the same with gradients as without"):
        cached_backward(encode, span_pair_loss, tokens(), chunk_size=4)


def test_the_generator_goes_on_as_after_one_pass():
    model, batch = Encoder(), tokens()
    cached_step(model, span_pair_loss, batch, chunk_size=4)
    after = torch.rand(3)
    chunked_step(model, span_pair_loss, batch, size=4)
    assert torch.equal(after, torch.rand(3))


def test_generators_of_all_devices(monkeypatch):
    """Also of those that only parameters are on, or to which the encoder moves its inputs."""

    class Generators:
        states = {"cuda:0": torch.tensor([0]), "cuda:1": torch.tensor([1])}  # noqa: RUF012

        def get_rng_state(self, device):
            return self.states[str(device)].clone()

        def set_rng_state(self, state, device):
            self.states[str(device)] = state

    generators = Generators()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: generators)
    state = gradient_cache.RandomState([torch.device("cuda:0"), torch.device("cuda:1")])
    generators.states = {"cuda:0": torch.tensor([7]), "cuda:1": torch.tensor([8])}
    with state.replayed():
        assert [int(s) for s in generators.states.values()] == [0, 1]
    assert [int(s) for s in generators.states.values()] == [7, 8]

    class Parameter(torch.Tensor):
        device = torch.device("cuda:1")

    module = nn.Module()
    module.parameters = lambda: [torch.zeros(1).as_subclass(Parameter)]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    found = gradient_cache._devices({"ids": torch.zeros(2)}, module)
    assert found == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_autocast():
    """Weights that were converted without a graph must not serve the second pass (PyTorch 2.13 sees to that itself)."""
    model = Encoder(head=True)
    plain = copy.deepcopy(model)
    batch = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(model, span_pair_loss, batch, chunk_size=5)
        chunked_step(plain, span_pair_loss, batch, size=5)
    assert model.linear.weight.grad.abs().max() > 0
    assert_same_gradients(model, plain, 2e-2)


def test_gradient_scaler():
    model = Encoder(head=True)
    plain = copy.deepcopy(model)
    batch, scaler = tokens(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = cached_step(model, span_pair_loss, batch, chunk_size=5, scaler=scaler)
    loss = chunked_step(plain, span_pair_loss, batch, size=5)
    torch.testing.assert_close(losses.loss, loss.detach())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert torch.allclose(model.linear.weight.grad, 1024 * plain.linear.weight.grad, rtol=1e-4)
    scaler.unscale_(optimizer)
    assert_same_gradients(model, plain)
    scaler.step(optimizer)


def test_mappings_and_several_encoders():
    """Queries and documents from encoders of their own; what is no tensor goes with every chunk."""
    seen = []

    def named(model):
        def encode(batch):
            seen.append(batch["task"])
            return model(batch["ids"])

        return encode

    queries, documents = Encoder(), Encoder()
    others = copy.deepcopy((queries, documents))
    batches = [{"ids": tokens(n), "task": task} for n, task in ((N, "query"), (2 * N, "document"))]
    torch.manual_seed(5)
    cached_backward([named(queries), named(documents)], contrastive_loss, *batches, chunk_size=7)
    torch.manual_seed(5)
    columns = [torch.cat([m(p["ids"]) for p in split_batch(b, 7)]) for m, b in zip(others, batches, strict=True)]
    contrastive_loss(*columns).backward()
    for model, other in zip((queries, documents), others, strict=True):
        assert_same_gradients(model, other)
    assert seen == 2 * (2 * ["query"] + 4 * ["document"])


def test_parameters_of_the_loss_and_without_gradients():
    model, batch = Encoder(), tokens()
    temperature = torch.tensor(2.0, requires_grad=True)
    loss_fn = lambda x: span_pair_loss(x * temperature)  # noqa: E731
    with torch.no_grad():
        evaluated = cached_step(model, loss_fn, batch, chunk_size=5)
    assert temperature.grad is None
    losses = cached_step(model, loss_fn, batch, chunk_size=5)
    assert losses.loss == evaluated.loss
    assert temperature.grad != 0


class Wrapper(nn.Module):
    """As DistributedDataParallel: gradients are synchronized after a forward and backward pass outside no_sync."""

    def __init__(self, module):
        super().__init__()
        self.module, self.synchronizes, self.seen = module, True, []
        module.linear.weight.register_hook(lambda _: self.seen.append(self.synchronizes))

    def forward(self, batch):
        return self.module(batch)

    def no_sync(self):
        return self._without()

    @gradient_cache.contextmanager
    def _without(self):
        self.synchronizes = False
        yield
        self.synchronizes = True


@pytest.mark.parametrize("synchronize", [True, False])
def test_synchronized_in_the_last_chunk_alone(synchronize):
    model = Wrapper(Encoder())
    cached_backward(model, contrastive_loss, tokens(), tokens(), chunk_size=5, synchronize=synchronize)
    assert model.seen == [False] * 5 + [synchronize]
    model, other = Wrapper(Encoder()), Wrapper(Encoder())
    cached_backward([model, other], contrastive_loss, tokens(), tokens(), chunk_size=5)
    assert model.seen == other.seen == [False, False, True]


@pytest.fixture(scope="module")
def one_process():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    plain = Encoder(head=True)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    reduced = []

    def hook(_, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    batch = tokens()
    cached_step(model, span_pair_loss, batch, chunk_size=5)
    chunked_step(plain, span_pair_loss, batch, size=5)
    assert_same_gradients(model, plain)
    assert 0 < len(reduced) == len(set(reduced))


def test_fully_sharded(one_process):
    from torch.distributed.fsdp import fully_shard

    plain = Encoder(head=True)
    model = copy.deepcopy(plain)
    fully_shard(model, mesh=one_process)
    batch = tokens()
    for synchronize in (False, True):  # gradients of two batches accumulate
        cached_step(model, span_pair_loss, batch, chunk_size=5, synchronize=synchronize)
        chunked_step(plain, span_pair_loss, batch, size=5)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)


def test_a_frozen_encoder():
    frozen, model = Encoder().requires_grad_(False), Encoder()
    cached_backward([model, frozen], contrastive_loss, tokens(), tokens(), chunk_size=5)
    assert model.linear.weight.grad is not None
    assert frozen.linear.weight.grad is None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size: expected an integer of at least 1, got 0"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size: expected an integer"),
        ({"batches": ()}, ValueError, "batches: expected at least one"),
        ({"batches": ({"a": torch.zeros(3), "b": torch.zeros(4)},)}, ValueError, r"batch: .* got lengths \[3, 4\]"),
        ({"batches": ("text",)}, ValueError, r"batch: expected tensors of one length of at least 1, got lengths \[\]"),
        ({"encode": [Encoder()] * 2}, ValueError, "encode: expected one, or one for each of the 1 batches, got 2"),
        ({"encode": lambda x: x.float().sum()}, ValueError, r"encode: expected to return embeddings .* got shape \(\)"),
        ({"loss_fn": lambda x: x}, ValueError, r"loss_fn: expected to return a scalar tensor, got shape \(12, 6\)"),
        (
            {"loss_fn": lambda x, y: x.sum(), "batches": (tokens(), tokens())},
            ValueError,
            "loss_fn: expected to use the embeddings of every batch, got none of batch 1",
        ),
        ({"chunk_loss_weight": float("nan")}, ValueError, "chunk_loss_weight: expected a finite number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_mistakes(changed, error, message):
    arguments = {"encode": Encoder(), "loss_fn": span_pair_loss, "batches": (tokens(),), "chunk_size": 5, **changed}
    batches = arguments.pop("batches")
    with pytest.raises(error, match=message):
        cached_backward(arguments.pop("encode"), arguments.pop("loss_fn"), *batches, **arguments)


def test_a_mean_of_nothing_that_is_nan_adds_nothing():
    """A chunk without a masked token, of a loss that is NaN there."""
    model = nn.Linear(WIDTH, WIDTH)
    rows = torch.randn(4, WIDTH)

    def encode(chunk):
        hidden = model(chunk["x"])
        counted = hidden[chunk["counts"]]
        return Encoded(hidden, counted.square().mean(), len(counted))

    batch = {"x": rows, "counts": torch.tensor([True, True, False, False])}
    losses = cached_backward(encode, lambda e: e.sum(), batch, chunk_size=2)
    found = model.weight.grad.clone()
    model.zero_grad()
    hidden = model(rows)
    loss = hidden.sum() + hidden[:2].square().mean()
    loss.backward()
    torch.testing.assert_close(losses.loss, loss.detach())
    torch.testing.assert_close(found, model.weight.grad)


def test_16_bits_count_no_things():
    model = nn.Linear(WIDTH, WIDTH).half()
    encode = lambda x: Encoded(model(x), model(x).float().square().mean().half(), 100_000)  # noqa: E731
    losses = cached_backward(encode, lambda e: e.float().sum(), torch.randn(4, WIDTH).half(), chunk_size=2)
    assert losses.chunk_loss.isfinite()
    assert losses.chunk_loss.dtype == torch.float32


def test_named_tuples_are_cut_and_losses_are_scalars_with_a_gradient():
    from collections import namedtuple

    pair = namedtuple("pair", "a b")
    parts = split_batch(pair(torch.arange(5), torch.arange(5)), 3)
    assert [type(part) for part in parts] == [pair, pair]
    assert parts[1].b.tolist() == [3, 4]
    rows = torch.randn(4, WIDTH)
    with pytest.raises(
        ValueError, match="loss_fn: expected a loss of the embeddings that it is given, got one without"
    ):
        cached_backward(nn.Linear(WIDTH, 2), lambda e: e.detach().sum(), rows, chunk_size=2)
    with pytest.raises(ValueError, match="encode: expected the loss of a chunk to be a scalar tensor"):
        cached_backward(lambda x: Encoded(x, x[:, 0]), lambda e: e.sum(), rows, chunk_size=2)
