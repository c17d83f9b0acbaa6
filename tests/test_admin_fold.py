"""fold_admin: plain torch modules with the outputs of the ADMIN model."""

import pickle

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch import nn
from torch.nn.utils import prune

import repdeg_fast
from repdeg_fast.nn import (
    AdminDecoder,
    AdminDecoderLayer,
    AdminEncoder,
    AdminEncoderLayer,
    AdminNorm,
    AdminTransformer,
    fold_admin,
)
from repdeg_fast.nn.admin.fold import ScaledInputDecoderLayer, ScaledInputEncoderLayer

D, B, S, T = 32, 3, 6, 5
LAYER = {"d_model": D, "nhead": 4, "dim_feedforward": 48, "dropout": 0.1, "batch_first": True}


def build(kind, **options):
    layer = {**LAYER, **options}
    if kind == "encoder layer":
        return AdminEncoderLayer(**layer)
    if kind == "decoder layer":
        return AdminDecoderLayer(**layer)
    if kind == "encoder":
        return AdminEncoder(AdminEncoderLayer(**layer), 3)
    if kind == "decoder":
        return AdminDecoder(AdminDecoderLayer(**layer), 2, nn.LayerNorm(D))
    return AdminTransformer(num_encoder_layers=3, num_decoder_layers=2, **layer)


KINDS = ["encoder layer", "decoder layer", "encoder", "decoder", "transformer"]


def as_if_trained(model):
    """ω that differ from entry to entry and have either sign, norms that are not the identity."""
    for name, parameter in model.named_parameters():
        if name.endswith("omega"):
            nn.init.uniform_(parameter, 0.5, 4.0)
            with torch.no_grad():
                parameter[::7] *= -1
        else:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(kind):
    source, target = torch.randn(B, S, D), torch.randn(B, T, D)
    return [source] if "encoder" in kind else [source, target] if kind == "transformer" else [target, source]


def admin_modules(model):
    return [module for module in model.modules() if "admin" in type(module).__module__]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"activation": "gelu", "layer_norm_eps": 1e-3}])
def test_outputs_are_equal(kind, options):
    model = as_if_trained(build(kind, **options)).eval()
    folded = fold_admin(model)
    tensors = inputs(kind)
    expected = model(*tensors)
    assert relative_error(folded(*tensors), expected) < TOLERANCE[torch.float32]
    with torch.no_grad():  # torch's fused inference path
        assert relative_error(folded(*tensors), expected) < TOLERANCE[torch.float32]


def test_outputs_are_equal_under_masks():
    model = as_if_trained(build("transformer")).eval()
    folded = fold_admin(model)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    tensors = inputs("transformer")
    with torch.no_grad():
        assert relative_error(folded(*tensors, **masks), model(*tensors, **masks)) < TOLERANCE[torch.float32]


def test_a_deep_model_after_the_profile():
    model = AdminTransformer(num_encoder_layers=18, num_decoder_layers=6, **LAYER)
    tensors = inputs("transformer")
    repdeg_fast.initialize_admin_(model, tensors)
    folded = fold_admin(model.eval())
    assert relative_error(folded(*tensors), model(*tensors)) < TOLERANCE[torch.float32]
    assert not admin_modules(folded), "the profile leaves ω of the first sub-layers at 1, so they are plain too"
    plain = nn.Transformer(num_encoder_layers=18, num_decoder_layers=6, **LAYER).eval()
    plain.load_state_dict(folded.state_dict())
    assert relative_error(plain(*tensors), model(*tensors)) < TOLERANCE[torch.float32]


def test_only_first_sublayers_keep_a_scale():
    model = as_if_trained(build("transformer"))
    folded = fold_admin(model)
    assert type(folded) is nn.Transformer
    assert [type(layer) for layer in folded.encoder.layers] == [ScaledInputEncoderLayer] + 2 * [
        nn.TransformerEncoderLayer
    ]
    assert [type(layer) for layer in folded.decoder.layers] == [ScaledInputDecoderLayer, nn.TransformerDecoderLayer]
    assert torch.equal(folded.encoder.layers[0].input_scale, model.encoder.layers[0].norm1.omega)
    expected = set(nn.Transformer(num_encoder_layers=3, num_decoder_layers=2, **LAYER).state_dict())
    scales = {"encoder.layers.0.input_scale", "decoder.layers.0.input_scale"}
    assert set(folded.state_dict()) == expected | scales
    assert [folded.encoder.layers[1].dropout1.p, folded.decoder.layers[1].dropout3.p] == [0.1, 0.1]
    copy = pickle.loads(pickle.dumps(folded)).eval()
    tensors = inputs("transformer")
    assert torch.equal(copy(*tensors), folded.eval()(*tensors))


def test_the_model_itself_stays_and_the_folded_one_trains():
    model = as_if_trained(build("transformer", dropout=0.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_admin(model)
    tensors = inputs("transformer")
    assert folded.training
    assert relative_error(folded(*tensors), model(*tensors)) < TOLERANCE[torch.float32]
    folded(*tensors).square().mean().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(admin_modules(model)) > 0


def test_layers_in_a_container_of_the_users():
    """Their order of execution is not known, so that each is folded by itself."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([AdminEncoderLayer(**LAYER) for _ in range(3)])

        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    model = as_if_trained(Backwards()).eval()
    x = torch.randn(B, S, D)
    assert relative_error(fold_admin(model)(x), model(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bad", [0.0, float("nan"), 1e-45])
def test_omega_without_an_inverse(bad):
    model = build("transformer")
    with torch.no_grad():
        model.decoder.layers[1].norm2.omega[3] = bad
    with pytest.raises(ValueError, match=r"decoder\.layers\.1\.norm2"):
        fold_admin(model)


def test_bad_input():
    with pytest.raises(ValueError, match="AdminNorm"):
        fold_admin(nn.Transformer(**LAYER, num_encoder_layers=1, num_decoder_layers=1))
    with pytest.raises(ValueError, match="1 elsewhere"):
        fold_admin(nn.Sequential(build("encoder layer"), AdminNorm(D)))
    layer = build("encoder layer")
    with pytest.raises(ValueError, match="several places"):
        fold_admin(nn.ModuleList([layer, layer]))
    layer.norm2 = AdminNorm(D, norm="rms")
    with pytest.raises(ValueError, match="LayerNorm"):
        fold_admin(layer)


def test_weights_that_are_computed_are_refused():
    """Dividing them by ω would leave no trace, and the outputs would be others."""
    for wrap in (nn.utils.parametrizations.weight_norm, lambda part: prune.l1_unstructured(part, "weight", 0.3)):
        model = build("transformer")
        wrap(model.encoder.layers[1].linear1)
        model(*inputs("transformer"))
        with pytest.raises(ValueError, match=r"got encoder\.layers\.1\.linear1\.weight that is computed"):
            fold_admin(model)
        with pytest.raises(ValueError, match=r"got encoder\.layers\.1\.linear1\.weight that is computed"):
            repdeg_fast.initialize_admin_(model, rule="deepnorm")
