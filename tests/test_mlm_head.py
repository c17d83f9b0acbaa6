"""MultiLayerMLMHead: against a head that transforms and projects every position, tying, selection, bad input."""

import copy
import warnings

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch import nn
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast import MultiLayerMLMHead
from repdeg_fast.ops.linear_cross_entropy import operation  # noqa: F401 - tells conftest where to test

V, WIDTH, K, B, T = 61, 24, 3, 4, 9


class Model(nn.Module):
    """An owner of the embedding with a head tied to it."""

    def __init__(self, padding_idx=None, **options):
        super().__init__()
        self.embedding = nn.Embedding(V, WIDTH, padding_idx=padding_idx)
        self.head = MultiLayerMLMHead(WIDTH, self.embedding, **options)


def batch(device="cpu", dtype=torch.float32, hidden_size=WIDTH):
    hidden_states = torch.randn(K, B, T, hidden_size, device=device, dtype=dtype)
    target = torch.randint(V, (B, T), device=device)
    return hidden_states, target.masked_fill(torch.rand(B, T, device=device) > 0.3, -100)


def every_position(head, hidden_states, target):
    """The K losses as published code has them: K logits tensors of all positions."""
    logits = [F.linear(head.transform(layer), head.weight, head.bias).flatten(0, -2) for layer in hidden_states]
    return torch.stack([F.cross_entropy(layer, target.flatten()) for layer in logits])


def test_losses_and_all_gradients(place):
    model, weights = Model().to(place.device), torch.tensor([1.0, 0.5, 2.0], device=place.device)
    nn.init.normal_(model.head.bias)
    hidden_states, target = batch(place.device)
    hidden_states.requires_grad_()
    losses = model.head(hidden_states, target)
    (losses * weights).sum().backward()

    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    wide = hidden_states.detach().double().requires_grad_()
    expected = every_position(exact.head, wide, target)
    (expected * weights.double()).sum().backward()

    assert losses.shape == (K,)
    assert relative_error(losses, expected) <= TOLERANCE[torch.float32]
    assert relative_error(hidden_states.grad, wide.grad) <= TOLERANCE[torch.float32]
    for (name, parameter), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(parameter.grad, right.grad) <= TOLERANCE[torch.float32], name


def test_only_masked_positions_are_transformed():
    model = Model()
    hidden_states, target = batch()
    seen = []
    model.head.dense.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    poisoned = hidden_states.masked_fill((target == -100)[..., None], float("nan"))
    torch.testing.assert_close(model.head(poisoned, target), every_position(model.head, hidden_states, target))
    assert seen[0] == (K, int((target != -100).sum()), WIDTH)


def test_the_host_waits_once_whatever_the_number_of_heads():
    """On a GPU `nonzero` is what waits; no value is read back (`item`, `tolist`, `bool`) for the head's own sake."""
    counted = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
                counted.append(function)
            return function(*args, **(kwargs or {}))

    model = Model()
    with Count():
        model.head(*batch())
    assert counted == [torch.ops.aten.nonzero.default]


@pytest.mark.gpu
def test_one_wait_on_a_gpu():
    model = Model().cuda()
    hidden_states, target = batch("cuda")
    model.head(hidden_states, target)  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.head(hidden_states, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


def test_a_sequence_equals_stacked_layers():
    head = Model().head
    hidden_states, target = batch()
    stacked = head(hidden_states, target)
    assert torch.equal(head(list(hidden_states), target), stacked)
    assert torch.equal(head(hidden_states.flatten(1, 2), target.flatten()), stacked)
    assert torch.equal(head(hidden_states[1:2], target.int()), stacked[1:2])


def test_options_are_those_of_the_loss():
    head = Model().head
    hidden_states, target = batch()
    other = target.masked_fill(target == -100, 7)
    mine = head(hidden_states, other, ignore_index=7, label_smoothing=0.1, strategy="streaming")
    logits = head.logits(hidden_states).flatten(1, 2)
    right = [F.cross_entropy(z, other.flatten(), ignore_index=7, label_smoothing=0.1) for z in logits]
    torch.testing.assert_close(mine, torch.stack(right))
    rows = head(hidden_states, target, reduction="none")
    torch.testing.assert_close(rows.mean(1), head(hidden_states, target))


def test_a_batch_without_masks_has_no_loss_and_no_gradient():
    model = Model()
    hidden_states, target = batch()
    losses = model.head(hidden_states, torch.full_like(target, -100))
    losses.sum().backward()
    assert torch.equal(losses, torch.zeros(K))
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_the_padding_row_gets_no_gradient(strategy):
    model = Model(padding_idx=5)
    hidden_states, target = batch()
    assert not (target == 5).all()
    (model.head(hidden_states, target, strategy=strategy).sum() + model.embedding(target.clamp(0)).sum()).backward()
    assert not model.embedding.weight.grad[5].any()
    assert model.embedding.weight.grad[4].any()


def test_the_embedding_is_its_owners_alone():
    model = Model()
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters()].count("embedding.weight") == 1
    assert set(model.head.state_dict()) == {
        *("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias")
    }
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters(recurse=True)))


def test_the_tie_survives_what_models_go_through(tmp_path):
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.head.weight, model.embedding.weight)
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embedding.weight
    assert copied.head.weight is not model.head.weight
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded.head.weight is loaded.embedding.weight
    assert model.double().head.weight is model.embedding.weight
    model.embedding.weight = nn.Parameter(torch.ones(V, WIDTH))  # as FSDP2 does
    assert model.head.weight is model.embedding.weight


def test_training_both_uses_of_the_embedding():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    words = torch.randint(V, (B, T))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        hidden_states = model.embedding(words.roll(1, 1))
        losses.append(model.head([hidden_states, 2 * hidden_states], words).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_parameter_or_a_linear_layer_can_be_tied():
    hidden_states, target = batch()
    linear = nn.Linear(WIDTH, V)
    for tied in (linear, linear.weight):
        head = MultiLayerMLMHead(WIDTH, tied, bias=False, activation=torch.tanh, layer_norm_eps=1e-5)
        assert head.weight is linear.weight
        assert head.bias is None
        torch.testing.assert_close(head(hidden_states, target), every_position(head, hidden_states, target))


def test_hidden_states_wider_than_the_embedding():
    head = MultiLayerMLMHead(40, nn.Embedding(V, WIDTH))
    hidden_states, target = batch(hidden_size=40)
    torch.testing.assert_close(head(hidden_states, target), every_position(head, hidden_states, target))


def test_autocast_in_bfloat16():
    model = Model()
    hidden_states, target = batch()
    exact = every_position(copy.deepcopy(model).double().head, hidden_states.double(), target)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.head(hidden_states, target)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert relative_error(losses, exact) <= TOLERANCE[torch.bfloat16]
    assert model.embedding.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda head, h, t: head(h[..., :-1], t), ValueError, r"hidden_states: expected a last dimension of 24"),
        (lambda head, h, t: head(h[0], t), ValueError, r"hidden_states\[0\]: expected shape \(4, 9, .*single layer"),
        (lambda head, h, t: head([h[0], h[1][:2]], t), ValueError, r"hidden_states\[1\]: expected shape \(4, 9, 24\)"),
        (lambda head, h, t: head([], t), ValueError, "hidden_states: expected at least one"),
        (lambda head, h, t: head([None], t), TypeError, r"hidden_states\[0\]: expected a tensor, got NoneType"),
        (lambda head, h, t: head(h.double(), t), TypeError, "hidden_states: expected torch.float32 like the module"),
        (lambda head, h, t: head(h.to("meta"), t), ValueError, r"hidden_states\[0\]: expected device cpu like target"),
        (lambda head, h, t: head(h, t.float()), TypeError, "target: .*int64 or int32"),
        (lambda head, h, t: head(h, t.tolist()), TypeError, "target: expected a tensor"),
        (lambda head, h, t: head(h, t.to_sparse()), ValueError, "target: expected a dense tensor, .*to_dense"),
        (lambda head, h, t: head(h, t, ignore_index=2**63), ValueError, "ignore_index: expected an integer that torch"),
        (lambda head, h, t: head(h, t, ignore_index=-(2**64)), ValueError, "ignore_index: expected an integer that"),
        (lambda head, h, t: head(h, t.masked_fill(t > 0, V)), ValueError, "target: expected values from 0 to 60"),
        (lambda head, h, t: MultiLayerMLMHead(8, "E"), TypeError, "embedding: expected nn.Embedding"),
        (lambda head, h, t: MultiLayerMLMHead(8, torch.ones(3)), ValueError, r"embedding: .*got shape \(3,\)"),
        (lambda head, h, t: MultiLayerMLMHead(8, head._tied[0], activation="sine"), ValueError, "activation: .*gelu"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(Model().head, *batch())


def test_repr_names_what_it_is_tied_to():
    assert "tied to Embedding(61, 24)" in repr(Model().head)
    assert repdeg_fast.nn.MultiLayerMLMHead is MultiLayerMLMHead
