"""What is not what an argument of a module, a model or a collator should be: an error that names the argument."""

import math

import pytest
import torch
from torch import nn

import repdeg_fast
from repdeg_fast import AdminNorm, AdminTransformer, CosineRegularization, GumbelMixture, MultiLayerMLMHead
from repdeg_fast.analysis import plot_table, save_table
from repdeg_fast.data import MaskingCollator
from repdeg_fast.nn import AdminDecoder, AdminDecoderLayer, AdminEncoder, AdminEncoderLayer, admin_norm_like

V, D, B, T = 30, 8, 2, 3
NAN = math.nan

# by kind: values that no argument of that kind takes
SIZE = [None, True, "8", 8.0, 0, -1, NAN, torch.ones(2)]
FLAG = [None, "yes", 1, 0.0, torch.ones(2)]
NUMBER = [None, True, "1", NAN, math.inf, torch.ones(2)]
POSITIVE = [*NUMBER, 0, -1.0]
DROPOUT = [*NUMBER, -0.1, 1.0]
PROBABILITY = [*NUMBER, -0.1, 1.5]
CHOICE = [None, True, 3, "none of them", ["auto"], torch.ones(2)]
ACTIVATION = ["none of them", None, 3, ["relu"]]
TENSOR = [None, 3, "x", {}, torch.ones(B, T, D, dtype=torch.int64), torch.ones(())]
OPTIONAL_TENSOR = TENSOR[1:]
MODULE = [None, 3, "x", torch.ones(2), nn.Module]
OPTIONAL_MODULE = MODULE[1:]
TOKEN = [None, True, "x", 1.5, -1, 2**63, torch.ones(2)]
TOKENS = [3, True, ["x"], [None], [1.5], [-1], torch.ones(2, 2)]
SEED = [True, "x", 1.5, 2**64, torch.ones(2, dtype=torch.int64), torch.ones(1)]
DTYPE = ["float32", 3, torch.int64]
INTEGER = [None, True, "x", 1.5]

LAYER = {"d_model": D, "nhead": 2, "dim_feedforward": D, "batch_first": True}
LAYER_KINDS = {
    "d_model": [*SIZE, 7], "nhead": SIZE, "dim_feedforward": SIZE, "dropout": DROPOUT, "activation": ACTIVATION,
    "layer_norm_eps": POSITIVE, "batch_first": FLAG, "norm_first": FLAG, "bias": FLAG, "dtype": DTYPE,
}  # fmt: skip
ROWS, HEADS = torch.ones(B, T, D), torch.ones(2, T, D)
LABELS = torch.tensor([[1, -100, 2], [-100, 3, -100]])
EMBEDDING = nn.Embedding(V, D)
TABLE = repdeg_fast.initialize_admin_(AdminNorm(D), rule="O(1)")


def encoder():
    return AdminEncoder(AdminEncoderLayer(**LAYER), 1)


# by what is called: what it is called with, and the kind of each argument
CALLS = {
    "AdminNorm": (
        AdminNorm,
        {"normalized_shape": D},
        {
            "normalized_shape": SIZE, "omega": NUMBER, "dropout": DROPOUT, "eps": POSITIVE, "norm": CHOICE,
            "elementwise_affine": FLAG, "bias": FLAG, "branch_bias": FLAG, "save": CHOICE, "dtype": DTYPE,
        },
    ),
    "AdminNorm()": (
        AdminNorm(D, dropout=0.1),
        {"x": ROWS, "branch": ROWS},
        {"x": TENSOR, "branch": TENSOR, "seed": SEED},
    ),
    "admin_norm_like": (
        admin_norm_like,
        {"layer_norm": nn.LayerNorm(D)},
        {"layer_norm": [*MODULE, nn.Linear(2, 2), nn.LayerNorm((2, 2))], "dropout": DROPOUT},
    ),
    "AdminEncoderLayer": (AdminEncoderLayer, LAYER, LAYER_KINDS),
    "AdminDecoderLayer": (AdminDecoderLayer, LAYER, LAYER_KINDS),
    "AdminEncoder": (
        AdminEncoder,
        {"encoder_layer": AdminEncoderLayer(**LAYER), "num_layers": 1},
        {"encoder_layer": MODULE, "num_layers": SIZE, "norm": OPTIONAL_MODULE},
    ),
    "AdminDecoder": (
        AdminDecoder,
        {"decoder_layer": AdminDecoderLayer(**LAYER), "num_layers": 1},
        {"decoder_layer": MODULE, "num_layers": SIZE, "norm": OPTIONAL_MODULE},
    ),
    "AdminTransformer": (
        AdminTransformer,
        {**LAYER, "num_encoder_layers": 1, "num_decoder_layers": 1},
        {
            **LAYER_KINDS, "num_encoder_layers": SIZE, "num_decoder_layers": SIZE, "custom_encoder": OPTIONAL_MODULE,
            "custom_decoder": OPTIONAL_MODULE,
        },
    ),
    "AdminEncoderLayer()": (
        AdminEncoderLayer(**LAYER),
        {"src": ROWS, "src_mask": torch.zeros(T, T)},
        {
            "src": [*TENSOR, ROWS.double()], "src_mask": OPTIONAL_TENSOR, "src_key_padding_mask": OPTIONAL_TENSOR,
            "is_causal": FLAG,
        },
    ),
    "AdminEncoderLayer(is_causal)": (
        AdminEncoderLayer(**LAYER),
        {"src": ROWS, "src_mask": torch.zeros(T, T), "is_causal": True},
        {"src_mask": OPTIONAL_TENSOR},
    ),
    "AdminDecoderLayer()": (
        AdminDecoderLayer(**LAYER),
        {"tgt": ROWS, "memory": ROWS},
        {
            "tgt": [*TENSOR, ROWS.double()], "memory": [*TENSOR, ROWS.double()],
            "tgt_mask": OPTIONAL_TENSOR, "memory_mask": OPTIONAL_TENSOR, "tgt_key_padding_mask": OPTIONAL_TENSOR,
            "memory_key_padding_mask": OPTIONAL_TENSOR, "tgt_is_causal": [*FLAG, True], "memory_is_causal": FLAG,
        },
    ),
    "from_torch": (
        repdeg_fast.from_torch,
        {"module": nn.TransformerEncoderLayer(D, 2, D)},
        {"module": [*MODULE, nn.Linear(2, 2)]},
    ),
    "fold_admin": (repdeg_fast.fold_admin, {"model": encoder()}, {"model": [*MODULE, nn.Linear(2, 2)]}),
    "initialize_admin_": (
        repdeg_fast.initialize_admin_,
        {"model": encoder(), "batch": ROWS},
        {"model": [*MODULE, nn.Linear(2, 2)], "batch": [None], "rule": CHOICE},
    ),
    "residual_dependency": (
        repdeg_fast.residual_dependency,
        {"model": encoder(), "batch": ROWS},
        {"model": [*MODULE, nn.Linear(2, 2)], "batch": [None]},
    ),
    "CosineRegularization": (CosineRegularization, {}, {"coefficient": NUMBER, "eps": POSITIVE}),
    "CosineRegularization()": (
        CosineRegularization(),
        {"weight": EMBEDDING},
        {"weight": [*TENSOR, nn.LayerNorm(D)], "row_weight": OPTIONAL_TENSOR},
    ),
    "GumbelMixture": (
        GumbelMixture,
        {"hidden_size": D},
        {
            "hidden_size": SIZE, "temperature": POSITIVE, "hard": FLAG, "gradient_scale": NUMBER,
            "detach_features": FLAG,
        },
    ),
    "GumbelMixture()": (
        GumbelMixture(D),
        {"features": HEADS, "hidden_states": HEADS, "weight": EMBEDDING.weight},
        {
            "features": [*TENSOR, HEADS.double()], "hidden_states": TENSOR, "weight": TENSOR,
            "bias": OPTIONAL_TENSOR, "embedding": OPTIONAL_TENSOR, "seed": SEED,
        },
    ),
    "MultiLayerMLMHead": (
        MultiLayerMLMHead,
        {"hidden_size": D, "embedding": EMBEDDING},
        {
            "hidden_size": SIZE, "embedding": [*TENSOR, nn.LayerNorm(D)], "activation": ACTIVATION,
            "layer_norm_eps": POSITIVE, "bias": FLAG,
        },
    ),
    "MultiLayerMLMHead()": (
        MultiLayerMLMHead(D, EMBEDDING),
        {"hidden_states": [ROWS, ROWS], "target": LABELS},
        {
            "hidden_states": [None, 3, "x", {}, [], [None], ROWS, [ROWS[0]], torch.ones(2)],
            "target": [None, 3, "x", {}, LABELS.float()], "ignore_index": INTEGER,
            "label_smoothing": [*NUMBER, 1.5], "softcap": POSITIVE[1:], "reduction": CHOICE[3:4], "strategy": ["x"],
        },
    ),
    "MultiLayerMLMHead.transform": (
        MultiLayerMLMHead(D, EMBEDDING).transform,
        {"hidden_states": ROWS},
        {"hidden_states": [*TENSOR, ROWS.double(), ROWS[..., 1:]]},
    ),
    "MultiLayerMLMHead.logits": (
        MultiLayerMLMHead(D, EMBEDDING).logits,
        {"hidden_states": ROWS},
        {"hidden_states": TENSOR},
    ),
    "MaskingCollator": (
        MaskingCollator,
        {"mask_token_id": 3, "pad_token_id": 0, "special_token_ids": [1, 2]},
        {
            "mask_token_id": TOKEN, "pad_token_id": TOKEN, "special_token_ids": [None, *TOKENS],
            "continuation_token_ids": TOKENS, "probability": PROBABILITY, "generator": [3, "x", torch.ones(2)],
        },
    ),
    "MaskingCollator.from_tokenizer": (
        MaskingCollator.from_tokenizer,
        {"tokenizer": type("Words", (), {
            "mask_token_id": 3, "pad_token_id": 0, "all_special_ids": [0, 3], "get_vocab": lambda _: {"##a": 4},
        })()},
        {"tokenizer": [None, 3, "x"], "whole_words": FLAG, "probability": PROBABILITY},
    ),
    "MaskingCollator()": (
        MaskingCollator(mask_token_id=3, pad_token_id=0, special_token_ids=[1, 2]),
        {"examples": [[1, 4, 2]]},
        {"examples": [None, 3, "x", {}, [], [None], [3], ["x"], [[1.5]], torch.ones(2), torch.ones(())]},
    ),
    "save_table": (save_table, {"table": TABLE, "path": "table.csv"}, {"table": [None, 3, [], "x"]}),
    "plot_table": (plot_table, {"table": TABLE, "path": "table.png"}, {"table": [None, 3, [], "x"]}),
}  # fmt: skip


def named(value):
    """For the test's id."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")
    return value.__class__.__name__ if isinstance(value, (nn.Module, dict)) else repr(value)[:30]


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_but_for_the_argument(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, arguments, _ = CALLS[name]
    function(**arguments)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        pytest.param(name, argument, value, id=f"{name}-{argument}-{named(value)}")
        for name, (_, _, kinds) in CALLS.items()
        for argument, values in kinds.items()
        for value in values
    ],
)
def test_an_error_names_the_argument(name, argument, value):
    function, arguments, _ = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b.*: expected .*got "):
        function(**arguments | {argument: value})
