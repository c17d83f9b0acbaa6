"""Modules whose parameters FSDP2 or tensor parallelism cut up, on a mesh of one process: what is served gives the
numbers of whole parameters, what is not is an error that names the argument and the remedy."""

import copy

import pytest
import torch
from torch import distributed, nn

import repdeg_fast
from repdeg_fast import CosineRegularization, MultiLayerMLMHead
from repdeg_fast.nn import AdminEncoder, AdminEncoderLayer

pytest.importorskip("torch.distributed.fsdp")
if not distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

V, D, B, T = 61, 24, 2, 5
LAYER = {"d_model": D, "nhead": 2, "dim_feedforward": D, "batch_first": True, "dropout": 0.0}


@pytest.fixture(scope="module")
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Model(nn.Module):
    """An embedding, used in four places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.head = MultiLayerMLMHead(D, self.embedding)
        self.regularizer = CosineRegularization()

    def forward(self, words):
        hidden = self.embedding(words)
        return self.head([hidden, 2 * hidden], words).sum() + self.regularizer(self.embedding)


def encoder():
    return AdminEncoder(AdminEncoderLayer(**LAYER), 2)


def sharded_encoder(mesh, by_layer=True):
    model = encoder()
    for layer in model.layers if by_layer else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def words():
    return torch.randint(V, (B, T))


def rows():
    return torch.randn(B, T, D)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("parts", [[], ["head"], ["regularizer"]], ids=str)
def test_training_under_fsdp(mesh, parts):
    plain, data = Model(), words()
    model = copy.deepcopy(plain)
    for part in parts:
        fully_shard(getattr(model, part), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for trained in (plain, model):
        trained(data).backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(whole(parameter.grad), expected.grad)


@pytest.mark.parametrize("by_layer", [True, False])
def test_an_encoder_under_fsdp(mesh, by_layer):
    model, data = sharded_encoder(mesh, by_layer), rows()
    plain = encoder()
    plain.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
    for trained in (plain, model):
        trained(data).square().sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad, msg=name)


def test_amos_under_fsdp(mesh):
    pytest.importorskip("transformers")
    from repdeg_fast.models import AmosConfig, AmosForPreTraining

    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "mlm_layers": (1, 2)}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": D}
    plain, data = AmosForPreTraining(AmosConfig(**sizes)), words()
    inputs = {"input_ids": data, "labels": data.masked_fill(torch.rand(B, T) > 0.5, -100), "seed": 3}
    model = copy.deepcopy(plain)
    for layer in (*model.discriminator.encoder.layer, *model.generator.encoder.layer):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for trained in (plain, model):
        trained(**inputs).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), expected.grad, msg=name)

    alone = fully_shard(AmosForPreTraining(AmosConfig(**sizes)).mlm_head, mesh=mesh)
    with pytest.raises(TypeError, match=r"hidden_states: expected a module whose weight is whole, .*the one around it"):
        alone.transform(rows())


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("rule", ["profile", "O(logn)"])
def test_omega_is_written_where_fsdp_keeps_it(mesh, rule, by_layer):
    """And not to the copy that is there during a forward pass, or, in the outermost module, afterwards."""
    model, data = sharded_encoder(mesh, by_layer), rows()
    model(data)  # the outermost module's parameters are copies from here on
    table = repdeg_fast.initialize_admin_(model, data, rule)
    kept = {name: whole(value) for name, value in model.state_dict().items()}
    for row in table:
        assert torch.equal(kept[f"{row.name}.omega"], torch.full((D,), row.omega))
    assert [row.omega for row in table] != [1.0] * 4

    bad = data.clone().fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        repdeg_fast.initialize_admin_(model, bad)
    for name, value in model.state_dict().items():
        assert torch.equal(whole(value), kept[name]), name
    shares = [share.share for share in repdeg_fast.residual_dependency(model, data).output("layers")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("ran", [True, False])
def test_what_needs_whole_weights(mesh, ran):
    model = sharded_encoder(mesh, by_layer=False)
    plain = fully_shard(nn.TransformerEncoderLayer(**LAYER), mesh=mesh)
    if ran:
        model(rows()), plain(rows())
    expected = r"expected whole parameters, got \S+ as a DTensor .*"
    with pytest.raises(ValueError, match=f"model: {expected}before you call fully_shard"):
        repdeg_fast.initialize_admin_(model, rule="deepnorm")
    with pytest.raises(ValueError, match=f"model: {expected}load the full state dict"):
        repdeg_fast.fold_admin(model)
    with pytest.raises(ValueError, match=f"module: {expected}before you call fully_shard"):
        repdeg_fast.from_torch(plain)


def test_an_embedding_sharded_by_itself(mesh):
    """The head gathers it for itself."""
    plain, data = Model(), words()
    model = copy.deepcopy(plain)
    fully_shard(model.embedding, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for trained in (plain, model):
        trained(data).backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad, msg=name)


def test_a_parameter_of_fsdp_is_no_shard_of_a_vocabulary(mesh):
    """Its ranks have other batches. CosReg takes it, and losses take it where it is whole."""
    model, hidden = fully_shard(Model(), mesh=mesh), torch.randn(4, D)
    target = torch.arange(4)
    remedy = r"got a parameter that fully_shard has cut .* inside the forward pass of the module"
    with pytest.raises(ValueError, match=f"weight: expected rows .*{remedy}"):
        repdeg_fast.linear_cross_entropy(hidden, model.embedding.weight, target)
    with pytest.raises(ValueError, match=remedy):
        repdeg_fast.gumbel_mix(hidden[None], None, model.embedding.weight)
    assert repdeg_fast.cosine_regularization(model.embedding.weight).isfinite()
    model(words())  # and after a pass
    model.reshard()
    with pytest.raises(ValueError, match=remedy):
        repdeg_fast.linear_cross_entropy(hidden, model.embedding.weight, target)
    plain = torch.randn(V, D)
    other = nn.Parameter(distribute_tensor(plain, mesh, [Shard(0)]))
    found = repdeg_fast.linear_cross_entropy(hidden, other, target)
    torch.testing.assert_close(found, repdeg_fast.linear_cross_entropy(hidden, plain, target))


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_dtensors_that_are_given(mesh, placement):
    """A table may be cut by rows, or copied; what else is given is whole."""
    plain = torch.randn(V, D)
    weight = nn.Parameter(distribute_tensor(plain, mesh, [placement]))
    torch.testing.assert_close(CosineRegularization()(weight), CosineRegularization()(plain))
    remedy = r"expected a plain tensor, got a DTensor .*full_tensor\(\)"
    with pytest.raises(TypeError, match=f"embedding: {remedy}"):
        MultiLayerMLMHead(D, weight)
    head, hidden = MultiLayerMLMHead(D, nn.Embedding(V, D)), distribute_tensor(rows(), mesh, [placement])
    with pytest.raises(TypeError, match=rf"hidden_states\[0\]: {remedy}"):
        head([hidden], words())
    with pytest.raises(TypeError, match=f"x: {remedy}"):
        repdeg_fast.AdminNorm(D)(hidden, hidden)
