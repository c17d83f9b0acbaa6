"""ADMIN's layers and Transformer against torch's own, and from_torch."""

import copy

import pytest
import torch
from helpers import TOLERANCE, relative_error
from torch import nn
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.bench import memory
from repdeg_fast.bench.suites import admin_encoder
from repdeg_fast.nn import (
    AdminDecoder,
    AdminDecoderLayer,
    AdminEncoder,
    AdminEncoderLayer,
    AdminNorm,
    AdminTransformer,
    admin_norm_like,
    from_torch,
)
from repdeg_fast.nn.admin.attention import attend

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")

D, HEADS, B, S, T = 32, 4, 3, 6, 5
LAYER = {"d_model": D, "nhead": HEADS, "dim_feedforward": 48, "dropout": 0.0}


def build(kind, **options):
    if kind == "encoder layer":
        return nn.TransformerEncoderLayer(**LAYER, **options)
    if kind == "decoder layer":
        return nn.TransformerDecoderLayer(**LAYER, **options)
    if kind == "encoder":
        return nn.TransformerEncoder(build("encoder layer", **options), 2, nn.LayerNorm(D, dtype=options.get("dtype")))
    if kind == "decoder":
        return nn.TransformerDecoder(build("decoder layer", **options), 2)
    return nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, **LAYER, **options)


KINDS = ["encoder layer", "decoder layer", "encoder", "decoder", "transformer"]


def randomize(module):
    """Norms that are not the identity, layers that differ."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def inputs(kind, batch_first=True):
    source, target = torch.randn(B, S, D), torch.randn(B, T, D)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    if "encoder" in kind:
        return [source]
    return [source, target] if kind == "transformer" else [target, source]


def masks(kind):
    """A causal mask, as float and as bool, padding, and is_causal, under the names that ``kind`` gives them."""
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask
    if "encoder" in kind:
        name = "mask" if kind == "encoder" else "src_mask"
        return [
            {"src_key_padding_mask": padding},
            {name: causal(S)},
            {name: causal(S), "is_causal": True},
            {name: causal(S).isinf(), "src_key_padding_mask": padding},
        ]
    return [
        {"memory_key_padding_mask": padding},
        {"tgt_mask": causal(T), "tgt_is_causal": True, "memory_key_padding_mask": padding},
        {"tgt_mask": causal(T).isinf(), "memory_mask": torch.randn(T, S)},
        {"tgt_key_padding_mask": padding[:, :T]},
    ]


def gradients(module, tensors, **options):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    output = module(*tensors, **options)
    module.zero_grad()
    output.square().sum().backward()
    own = {name: p.grad for name, p in module.named_parameters() if "omega" not in name}
    return output, [tensor.grad for tensor in tensors], own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", range(5))
def test_from_torch_has_equal_outputs_and_gradients(kind, training, case):
    original = randomize(build(kind, batch_first=True)).train(training)
    converted = from_torch(original)
    options = [{}, *masks(kind)][case]
    tensors = inputs(kind)
    expected, expected_inputs, expected_own = gradients(original, tensors, **options)
    output, gradient_inputs, own = gradients(converted, tensors, **options)
    assert relative_error(output, expected) < TOLERANCE[torch.float32]
    for got, wanted in zip(gradient_inputs, expected_inputs, strict=True):
        assert relative_error(got, wanted) < TOLERANCE[torch.float32]
    assert own.keys() == expected_own.keys()
    for name, wanted in expected_own.items():
        assert (own[name] - wanted).norm() <= 1e-5 * (wanted.norm() + expected.norm()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": False},
        {"bias": False},
        {"activation": "gelu"},
        {"activation": lambda x: torch.tanh(x)},
        {"activation": nn.SiLU()},
        {"layer_norm_eps": 0.5},
        {"dtype": torch.float64},
    ],
    ids=["seq_first", "no bias", "gelu", "function", "module", "eps", "float64"],
)
def test_constructor_options(kind, options):
    original = randomize(build(kind, **{"batch_first": True, **options}))
    converted = from_torch(original)
    dtype = options.get("dtype", torch.float32)
    tensors = [tensor.to(dtype) for tensor in inputs(kind, options.get("batch_first", True))]
    assert relative_error(converted(*tensors), original(*tensors)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
@pytest.mark.parametrize("form", ["unbatched", "a mask a head", "float masks", "float64"])
def test_forms_of_input(kind, form):
    original = randomize(build(kind, batch_first=form != "a mask a head"))
    tensors = inputs(kind, batch_first=form != "a mask a head")
    queries, keys = (S, S) if kind == "encoder layer" else (T, S)
    name = "src" if kind == "encoder layer" else "memory"
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    masks = {f"{name}_mask": torch.rand(queries, keys) > 0.8, f"{name}_key_padding_mask": padding}
    if form == "unbatched":
        tensors = [tensor[1] for tensor in tensors]
        masks[f"{name}_key_padding_mask"] = padding[1]
    elif form == "a mask a head":
        masks = {f"{name}_mask": torch.rand(B * HEADS, queries, keys) > 0.8}
    elif form == "float masks":
        masks = {key: torch.randn(mask.shape).masked_fill(mask, float("-inf")) for key, mask in masks.items()}
    else:
        original, tensors = original.double(), [tensor.double() for tensor in tensors]
    output = from_torch(original)(*tensors, **masks)
    assert relative_error(output, original(*tensors, **masks)) < TOLERANCE[output.dtype]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_padding_mask": (S, B)}, rf"key_padding_mask: expected shape \({B}, {S}\), .* got \({S}, {B}\)"),
        ({"key_padding_mask": (B * S,)}, rf"key_padding_mask: expected shape \({B}, {S}\)"),
        ({"mask": (1, S)}, rf"mask: expected shape \({T}, {S}\), or \({B * HEADS}, {T}, {S}\).* got \(1, {S}\)"),
        ({"mask": (B, T, S)}, "mask: expected shape"),
        ({"memory": (1, S, D)}, rf"memory: expected the batch of query \({B}, {T}, {D}\), got \(1, {S}, {D}\)"),
        ({"memory": (S, D)}, "memory: expected the batch"),
        ({"memory": (B, S, D + 1)}, rf"memory: expected shape \(B, L, {D}\) or \(L, {D}\)"),
        ({"query": (1, B, T, D)}, "query: expected shape"),
        ({"query": (B, T, 2)}, "query: expected shape"),
    ],
    ids=str,
)
def test_shapes_that_do_not_agree(options, message):
    """Broadcasting would take most of these for something else; torch's own layer refuses them too."""
    shapes = {"query": (B, T, D), "memory": (B, S, D), "mask": (T, S), "key_padding_mask": (B, S), **options}
    query, memory, mask, padding = (torch.zeros(shape) for shape in shapes.values())
    plain = build("decoder layer", batch_first=True)
    masks = {"memory_mask": mask, "memory_key_padding_mask": padding}
    with pytest.raises((AssertionError, RuntimeError)):
        plain(query, memory, **masks)
    with pytest.raises(ValueError, match=message):
        attend(plain.multihead_attn, query, memory, mask, padding, False)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(3, D)])
    with pytest.raises(ValueError, match=r"src: expected a dense tensor, got a nested one; .*to_padded_tensor"):
        AdminEncoderLayer(**LAYER, batch_first=True)(nested)


def test_inference_without_gradients_takes_the_same_path():
    """torch has fused inference paths that know no ω; with ω ≠ 1 taking one would show."""
    model = from_torch(build("encoder", batch_first=True)).eval()
    nn.init.constant_(model.layers[0].norm1.omega, 3.0)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(B, S, D)
    for options in ({}, {"src_key_padding_mask": padding}):
        expected = model(x, **options)
        with torch.no_grad():
            assert relative_error(model(x, **options), expected) < TOLERANCE[torch.float32]


def test_layers_in_torchs_own_stack():
    """Nested tensors, which torch's encoder makes of a padded batch, must not reach the layer."""
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        model = nn.TransformerEncoder(AdminEncoderLayer(**LAYER, batch_first=True), 2).eval()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(B, S, D)
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding)
    expected = AdminEncoder(model.layers[0], 2)
    expected.load_state_dict(model.state_dict())
    assert relative_error(got, expected.eval()(x, src_key_padding_mask=padding)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("admin", "plain"),
    [(AdminEncoderLayer, nn.TransformerEncoderLayer), (AdminDecoderLayer, nn.TransformerDecoderLayer)],
)
def test_layers_are_built_like_torchs(admin, plain):
    torch.manual_seed(1)
    expected = plain(D, HEADS, 48, 0.0, F.gelu, 1e-3, True, False, True).state_dict()
    torch.manual_seed(1)
    state = admin(D, HEADS, 48, 0.0, F.gelu, 1e-3, True, False, True).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_transformer_is_built_like_torchs_and_loads_its_state():
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 1, **LAYER}
    torch.manual_seed(1)
    plain = nn.Transformer(**sizes)
    torch.manual_seed(1)
    model = AdminTransformer(**sizes)
    assert isinstance(model.encoder, AdminEncoder)
    assert isinstance(model.decoder, AdminDecoder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())
    report = model.load_state_dict(randomize(plain).state_dict(), strict=False)
    assert not report.unexpected_keys
    omegas = [name for name, module in model.named_modules() if isinstance(module, AdminNorm)]
    assert sorted(report.missing_keys) == sorted(f"{name}.omega" for name in omegas)
    source, target = torch.randn(S, B, D), torch.randn(T, B, D)
    assert relative_error(model(source, target), plain(source, target)) < TOLERANCE[torch.float32]


def test_custom_stacks_are_taken_as_they_are():
    encoder = AdminEncoder(AdminEncoderLayer(**LAYER), 1)
    model = AdminTransformer(**LAYER, custom_encoder=encoder, num_decoder_layers=1)
    assert model.encoder is encoder
    assert isinstance(model.decoder.layers[0], AdminDecoderLayer)


def test_an_activation_that_is_a_module_survives_copies():
    """torch's decoder layer turns it into ReLU."""
    model = AdminTransformer(**LAYER, num_encoder_layers=1, num_decoder_layers=2, activation=nn.SiLU())
    assert all(isinstance(layer.activation, nn.SiLU) for layer in [*model.encoder.layers, *model.decoder.layers])


def test_omega_takes_part_and_learns():
    layer = AdminEncoderLayer(**LAYER, batch_first=True)
    x = torch.randn(B, S, D)
    before = layer(x)
    nn.init.constant_(layer.norm2.omega, 2.0)
    assert relative_error(layer(x), before) > 0.01
    layer(x).square().mean().backward()
    assert layer.norm1.omega.grad.abs().sum() > 0
    inner = F.layer_norm(x + layer.self_attn(x, x, x, need_weights=False)[0], (D,))
    branch = layer.linear2(F.relu(layer.linear1(inner)))
    assert relative_error(layer(x), F.layer_norm(2 * inner + branch, (D,))) < TOLERANCE[torch.float32]


def test_dropout_drops_in_every_place():
    layer = AdminEncoderLayer(D, HEADS, 48, dropout=0.3, batch_first=True)
    assert [layer.norm1.dropout, layer.norm2.dropout, layer.dropout.p, layer.self_attn.dropout] == [0.3] * 4
    x = torch.randn(B, S, D)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_conversion_of_a_model_that_contains_transformers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, D)
            self.encoder = build("encoder", batch_first=True)

        def forward(self, tokens):
            return F.linear(self.encoder(self.embedding(tokens)), self.embedding.weight)

    model = Model().eval()
    model.encoder.layers[0].linear1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    converted = from_torch(model)
    assert isinstance(model.encoder.layers[0].norm1, nn.LayerNorm), "the original stays as it is"
    assert isinstance(converted.encoder, AdminEncoder)
    assert not converted.training
    assert not converted.encoder.layers[0].norm1.training
    assert not converted.encoder.layers[0].linear1.weight.requires_grad
    tokens = torch.randint(10, (B, S))
    assert relative_error(converted(tokens), model(tokens)) < TOLERANCE[torch.float32]
    with torch.no_grad():
        converted.encoder.layers[0].linear1.weight.zero_()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_compiles_as_one_graph_with_masks():
    model = AdminEncoder(AdminEncoderLayer(**LAYER, batch_first=True), 2)
    x = torch.randn(B, S, D)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    options = {"mask": torch.rand(S, S) > 0.8, "src_key_padding_mask": padding, "is_causal": False}
    assert relative_error(compiled(x, **options), model(x, **options)) < TOLERANCE[torch.float32]


def test_bfloat16_autocast():
    model = AdminEncoder(AdminEncoderLayer(**LAYER, batch_first=True), 2)
    x = torch.randn(B, S, D)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert relative_error(output, expected) < 3 * TOLERANCE[torch.bfloat16]  # the products round too
    output.float().sum().backward()


def test_admin_norm_like_shares_the_parameters():
    layer_norm = nn.LayerNorm(D, eps=1e-12)
    norm = admin_norm_like(layer_norm, dropout=0.2)
    assert norm.weight is layer_norm.weight
    assert norm.bias is layer_norm.bias
    assert (norm.eps, norm.dropout) == (1e-12, 0.2)
    x, branch = torch.randn(7, D), torch.randn(7, D)
    assert relative_error(norm.eval()(x, branch), layer_norm(x + branch)) < TOLERANCE[torch.float32]
    assert admin_norm_like(nn.LayerNorm(D, elementwise_affine=False)).weight is None
    with pytest.raises(TypeError, match="layer_norm"):
        admin_norm_like(nn.BatchNorm1d(D))
    with pytest.raises(ValueError, match="normalized_shape"):
        admin_norm_like(nn.LayerNorm((4, D)))


def test_bad_input():
    for admin in (AdminEncoderLayer, AdminDecoderLayer, AdminTransformer):
        with pytest.raises(ValueError, match="norm_first"):
            admin(d_model=D, nhead=HEADS, norm_first=True)
    with pytest.raises(ValueError, match=r"module\.layers\.0.*norm_first"):
        from_torch(build("decoder", norm_first=True))
    with pytest.raises(ValueError, match="got Linear without"):
        from_torch(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="without"):
        from_torch(AdminEncoderLayer(D, HEADS))

    class Mine(nn.TransformerEncoderLayer):
        pass

    with pytest.raises(TypeError, match="Mine"):
        from_torch(Mine(D, HEADS))
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 7}):
        layer = build("encoder layer")
        layer.self_attn = nn.MultiheadAttention(D, HEADS, **options)
        with pytest.raises(TypeError, match=r"module\.self_attn"):
            from_torch(layer)
    for child, part in (("dropout1", nn.Identity()), ("dropout2", nn.Dropout1d(0.1)), ("norm1", nn.RMSNorm(D))):
        stack = build("encoder")
        setattr(stack.layers[1], child, part)
        with pytest.raises(TypeError, match=rf"module\.layers\.1\.{child}: .*got {type(part).__name__}"):
            from_torch(stack)
    layer = AdminEncoderLayer(D, HEADS)
    with pytest.raises(ValueError, match="is_causal"):
        layer(torch.randn(S, B, D), is_causal=True)
    with pytest.raises(TypeError, match=r"mask: .*int64"):
        layer(torch.randn(S, B, D), torch.zeros(S, S, dtype=torch.int64))
    with pytest.raises(TypeError, match="encoder_layer"):
        AdminEncoder(nn.TransformerEncoderLayer(D, HEADS), 2)
    with pytest.raises(TypeError, match="decoder_layer"):
        AdminDecoder(AdminEncoderLayer(D, HEADS), 2)


def test_public_names():
    assert repdeg_fast.from_torch is from_torch
    assert repdeg_fast.AdminTransformer is AdminTransformer


@pytest.mark.parametrize("dropout", [0, 10])
def test_benchmark_of_a_whole_encoder(dropout):
    """Every provider trains the same tensors; ADMIN's keep less for the backward pass than torch's layers, by the sums
    and, with dropout, the masks."""
    layers, tokens, width = 2, 2 * 16, 32
    case = admin_encoder._case("tiny", layers, 2, 16, width, dropout=dropout)
    inputs = admin_encoder.make_inputs(case, torch.device("cpu"))
    calls = {p.name: p.prepare(inputs) for p in admin_encoder.SUITE.providers if p.name in ("eager", "ours-reference")}
    saved = {name: memory.saved_bytes(call, inputs) for name, call in calls.items()}
    sums = (2 * layers - 1) * tokens * width * 4  # the last output is kept too, which nothing after it needs here
    masks = 2 * layers * tokens * width if dropout else 0
    turned = (layers - 1) * tokens * width * 4  # torch keeps a layer's input transposed; the first one's by any means
    assert saved["eager"] - saved["ours-reference"] >= sums + masks + turned
    for call in calls.values():
        assert relative_error(call(), admin_encoder.exact(inputs)) < TOLERANCE[torch.float32]
        call().sum().backward()
    assert inputs["layers.1.norm2.omega"].grad is not None
